package identity

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// A disk that grew tells its driver by an interrupt.
	growDeadline = 5 * time.Second
	growPause    = time.Millisecond
	sectorBytes  = 512
	ext4ResizeFS = 0x40086610 // EXT4_IOC_RESIZE_FS, fs/ext4/ext4.h: _IOW('f', 16, __u64)
)

var errTooSmall = errors.New("the root's disk did not grow in time")

// growRoot waits until the root's disk has the size asked for and lets the file system fill it,
// mounted as it is. Another file system than ext4 is left alone.
func (i *Identity) growRoot(in *Introduction) error {
	if in.RootBytes <= i.filled {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err != nil {
		return err
	}
	if fs.Type != unix.EXT4_SUPER_MAGIC {
		return nil
	}
	var stat unix.Stat_t
	if err := unix.Stat("/", &stat); err != nil {
		return err
	}
	device := fmt.Sprintf("/sys/dev/block/%d:%d/size", unix.Major(stat.Dev), unix.Minor(stat.Dev))
	size, err := waitForSize(device, in.RootBytes, growDeadline)
	if err != nil {
		return err
	}
	if err := fill("/", uint64(size/fs.Bsize)); err != nil {
		return err
	}
	i.filled = size
	return nil
}

// waitForSize waits until a block device has at least so many bytes, and returns what it has.
func waitForSize(device string, atLeast int64, deadline time.Duration) (int64, error) {
	for until := time.Now().Add(deadline); ; time.Sleep(growPause) {
		content, err := os.ReadFile(device)
		if err != nil {
			return 0, err
		}
		sectors, err := strconv.ParseInt(strings.TrimSpace(string(content)), 10, 64)
		if err != nil {
			return 0, err
		}
		size := sectors * sectorBytes
		if size >= atLeast {
			return size, nil
		}
		if time.Now().After(until) {
			return 0, fmt.Errorf("%w: it has %d bytes, not %d", errTooSmall, size, atLeast)
		}
	}
}

// fill grows a mounted ext4 to so many blocks; one that has them already is not changed.
func fill(mounted string, blocks uint64) error {
	root, err := os.Open(mounted)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return errno
	}
	return nil
}
