package identity

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

func TestTheDiskIsWaitedFor(t *testing.T) {
	device := filepath.Join(t.TempDir(), "size")
	write := func(bytes int64) {
		if err := os.WriteFile(device+".new", []byte(strconv.FormatInt(bytes/sectorBytes, 10)+"\n"), 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Rename(device+".new", device); err != nil {
			t.Error(err)
		}
	}
	write(mib)
	if size, err := waitForSize(device, mib, 0); size != mib || err != nil {
		t.Errorf("one that is there already: %d, %v", size, err)
	}
	if _, err := waitForSize(device, mib+1, 10*time.Millisecond); !errors.Is(err, errTooSmall) {
		t.Errorf("one that never comes: %v", err)
	}
	grown := time.AfterFunc(20*time.Millisecond, func() { write(3 * mib) })
	defer grown.Stop()
	if size, err := waitForSize(device, 2*mib, growDeadline); size != 3*mib || err != nil {
		t.Errorf("one that comes late: %d, %v", size, err)
	}
}

func TestAMountedFileSystemFillsItsDisk(t *testing.T) {
	if os.Geteuid() != 0 || !mayResize(t) {
		t.Skip("mounting needs root, and growing CAP_SYS_RESOURCE")
	}
	image, mounted := filepath.Join(t.TempDir(), "image"), t.TempDir()
	run := func(words ...string) string {
		t.Helper()
		said, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v %s", words, err, said)
		}
		return strings.TrimSpace(string(said))
	}
	run("truncate", "-s", "64M", image)
	run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", image)
	loop := run("losetup", "--find", "--show", image)
	t.Cleanup(func() { run("losetup", "--detach", loop) })
	if err := unix.Mount(loop, mounted, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mounted, 0) })
	run("truncate", "-s", "128M", image)
	run("losetup", "--set-capacity", loop)
	blocks := func() uint64 {
		var fs unix.Statfs_t
		if err := unix.Statfs(mounted, &fs); err != nil {
			t.Fatal(err)
		}
		return fs.Blocks
	}
	before := blocks()
	for range 2 {
		if err := fill(mounted, 128*mib/4096); err != nil {
			t.Fatal(err)
		}
	}
	if after := blocks(); after < 2*before {
		t.Errorf("it has %d blocks and had %d", after, before)
	}
}

func mayResize(t *testing.T) bool {
	t.Helper()
	var have [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0]); err != nil {
		t.Fatal(err)
	}
	return have[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
