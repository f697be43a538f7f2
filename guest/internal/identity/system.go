package identity

import (
	"encoding/base64"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/content"
	"sandmartin.dev/guest/internal/sockets"
)

// What a user may list in /etc/hosts; a larger one is left as it is.
const maxHosts = 16 << 20

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
	device, err := urandom()
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(device), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool[0]))); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(device), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

// urandom stays open.
var urandom = sync.OnceValues(func() (int, error) {
	return unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
})

func setHostname(in *Introduction) error {
	if in.Hostname == "" {
		return nil
	}
	if err := unix.Sethostname([]byte(in.Hostname)); err != nil {
		return err
	}
	err := content.Replace("/etc/hostname", in.Hostname+"\n", 0o644)
	if errors.Is(err, os.ErrNotExist) {
		// An image may have next to nothing.
		err = errors.Join(os.MkdirAll("/etc", 0o755), content.Replace("/etc/hostname", in.Hostname+"\n", 0o644))
	}
	if err != nil {
		return err
	}
	hosts, err := content.Read("/etc/hosts", maxHosts)
	switch {
	case errors.Is(err, unix.EFBIG):
		return nil
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	}
	return content.Replace("/etc/hosts", replaceHostLine(string(hosts), in.Hostname), 0o644)
}

// replaceHostLine points 127.0.1.1, where Debian keeps it, at the host's own name.
func replaceHostLine(hosts, hostname string) string {
	var kept strings.Builder
	kept.Grow(len(hosts) + len(hostname) + 64)
	for line := range strings.Lines(hosts) {
		if !isHostLine(line) {
			kept.WriteString(line)
			if !strings.HasSuffix(line, "\n") {
				kept.WriteByte('\n')
			}
		}
	}
	if !strings.Contains(hosts, "localhost") {
		kept.WriteString("127.0.0.1\tlocalhost\n")
	}
	kept.WriteString("127.0.1.1\t" + hostname + "\n")
	return kept.String()
}

func isHostLine(line string) bool {
	names, found := strings.CutPrefix(strings.TrimLeft(line, " \t"), "127.0.1.1")
	return found && (names == "" || strings.IndexByte(" \t\n\r", names[0]) >= 0)
}

func setMachineID(in *Introduction) error {
	if in.MachineID == "" {
		return nil
	}
	if err := content.Replace("/etc/machine-id", in.MachineID+"\n", 0o444); err != nil {
		return err
	}
	const dbus = "/var/lib/dbus/machine-id"
	if info, err := os.Lstat(dbus); err == nil && info.Mode().IsRegular() {
		return content.Replace(dbus, in.MachineID+"\n", 0o444)
	}
	return nil
}

func setClock(in *Introduction) error {
	now := time.Unix(0, in.UnixNano)
	if in.UnixNano == 0 {
		if in.Timestamp == "" {
			return nil
		}
		var err error
		// In a location of its own an offset is not looked up in the image's time zone.
		if now, err = time.ParseInLocation(time.RFC3339Nano, in.Timestamp, time.UTC); err != nil {
			return err
		}
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
	_, err := sockets.DestroyOutside(connectionOf(in.request))
	if errors.Is(err, errors.ErrUnsupported) {
		log.Printf("connections to the outside are left to time out: %v", err)
		return nil
	}
	return err
}
