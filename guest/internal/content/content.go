// Package content reads and changes small files whole, by nothing but the system calls that takes.
//
// It is for what happens at the beginning of a restored VM, where every piece of code that runs
// for the first time costs: a file of the standard library brings the poller and a finalizer.
package content

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const firstRead = 512

// Read returns what is in a file, of which there must be no more than limit bytes.
func Read(path string, limit int) ([]byte, error) {
	fd, err := open(path, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	buffer := make([]byte, min(firstRead, limit+1))
	for size := 0; ; {
		n, err := unix.Read(fd, buffer[size:])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return buffer[:size], nil
		}
		if size += n; size > limit {
			return nil, &os.PathError{Op: "read", Path: path, Err: unix.EFBIG}
		}
		if size == len(buffer) {
			buffer = append(buffer, make([]byte, min(size, limit+1-size))...)
		}
	}
}

// Write writes to a file that is there, from its beginning.
func Write(path, text string) error {
	fd, err := open(path, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return writeAll(fd, path, text)
}

// Replace changes a file in place, made with such a mode if it is not there: one on a full disk can
// be changed too, because blocks in use are not given up first. What is as it should be is left.
func Replace(path, text string, mode uint32) error {
	fd, err := open(path, unix.O_RDWR|unix.O_CREAT, mode)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	current := make([]byte, len(text)+1)
	n, err := unix.Pread(fd, current, 0)
	if err != nil {
		return &os.PathError{Op: "read", Path: path, Err: err}
	}
	if string(current[:n]) == text {
		return nil
	}
	if err := writeAll(fd, path, text); err != nil {
		return err
	}
	if n <= len(text) {
		return nil
	}
	return unix.Ftruncate(fd, int64(len(text)))
}

func writeAll(fd int, path, text string) error {
	n, err := unix.Pwrite(fd, []byte(text), 0)
	if err == nil && n < len(text) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

func open(path string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, mode)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return fd, nil
	}
}
