package identity

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/sockets"
)

// addEntropy credits the host's random bytes to the kernel and has its generator reseeded
// (random(4)): two forks of one parent must not draw the same numbers.
func addEntropy(in *Introduction) error {
	if in.Entropy == "" {
		return nil
	}
	bytes, err := base64.StdEncoding.DecodeString(in.Entropy)
	if err != nil {
		return err
	}
	if len(bytes) < minEntropy {
		return fmt.Errorf("%d bytes are too few", len(bytes))
	}
	bytes = bytes[:len(bytes)&^3]
	pool := make([]int32, 2+len(bytes)/4)
	pool[0], pool[1] = int32(len(bytes)*8), int32(len(bytes))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&pool[2])), len(bytes)), bytes)
	device, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool[0]))); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

func setHostname(in *Introduction) error {
	if in.Hostname == "" {
		return nil
	}
	if err := unix.Sethostname([]byte(in.Hostname)); err != nil {
		return err
	}
	err := replaceContent("/etc/hostname", in.Hostname+"\n", 0o644)
	if errors.Is(err, os.ErrNotExist) {
		// An image may have next to nothing.
		err = errors.Join(os.MkdirAll("/etc", 0o755), replaceContent("/etc/hostname", in.Hostname+"\n", 0o644))
	}
	if err != nil {
		return err
	}
	hosts := "127.0.0.1\tlocalhost\n127.0.1.1\t" + in.Hostname + "\n"
	current, err := os.ReadFile("/etc/hosts")
	if err == nil {
		hosts = replaceHostLine(string(current), in.Hostname)
	}
	return replaceContent("/etc/hosts", hosts, 0o644)
}

// replaceContent changes a small file in place: a sandbox whose disk is full can still be told who
// it is, because blocks in use are not given up first.
func replaceContent(path, content string, mode os.FileMode) error {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, mode)
	if err != nil {
		return err
	}
	defer file.Close()
	current, err := io.ReadAll(io.LimitReader(file, int64(len(content))+1))
	if err != nil || string(current) == content {
		return err
	}
	if _, err := file.WriteAt([]byte(content), 0); err != nil {
		return err
	}
	if len(current) <= len(content) {
		return nil
	}
	return file.Truncate(int64(len(content)))
}

// replaceHostLine points 127.0.1.1, where Debian keeps it, at the host's own name.
func replaceHostLine(content, hostname string) string {
	var kept []string
	for line := range strings.Lines(content) {
		if fields := strings.Fields(line); len(fields) == 0 || fields[0] != "127.0.1.1" {
			kept = append(kept, strings.TrimRight(line, "\n"))
		}
	}
	if !strings.Contains(content, "localhost") {
		kept = append(kept, "127.0.0.1\tlocalhost")
	}
	return strings.Join(append(kept, "127.0.1.1\t"+hostname), "\n") + "\n"
}

func setMachineID(in *Introduction) error {
	if in.MachineID == "" {
		return nil
	}
	if err := replaceContent("/etc/machine-id", in.MachineID+"\n", 0o444); err != nil {
		return err
	}
	const dbus = "/var/lib/dbus/machine-id"
	if info, err := os.Lstat(dbus); err == nil && info.Mode().IsRegular() {
		return replaceContent(dbus, in.MachineID+"\n", 0o444)
	}
	return nil
}

func setClock(in *Introduction) error {
	if in.Timestamp == "" {
		return nil
	}
	// In a location of its own an offset is not looked up in the image's time zone.
	now, err := time.ParseInLocation(time.RFC3339Nano, in.Timestamp, time.UTC)
	if err != nil {
		return err
	}
	// The steps before this one took their time.
	now = now.Add(time.Since(in.received))
	if time.Since(now).Abs() < clockTolerance {
		return nil
	}
	spec := unix.NsecToTimespec(now.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &spec)
}

// leavePlace ends the connections to the outside of a VM that is in another place than it
// believes: their peers know nothing of it. A kernel that cannot is no reason not to go on.
func (i *Identity) leavePlace(in *Introduction) error {
	// Before the first introduction nothing ran that could have connected.
	if !in.Moved || !i.Introduced() {
		return nil
	}
	_, err := sockets.DestroyOutside(in.connection)
	if errors.Is(err, errors.ErrUnsupported) {
		log.Printf("connections to the outside are left to time out: %v", err)
		return nil
	}
	return err
}
