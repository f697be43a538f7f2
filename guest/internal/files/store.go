package files

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/metadata"
	"sandmartin.dev/guest/internal/users"
)

const (
	// Space an upload may not take, or this part of a small file system: the guest must go on
	// working on a full disk.
	reserve     = 16 << 20
	reservePart = 16
	// What st_blocks counts in, stat(2).
	statBlock = 512
	// How often the free space is looked at during an upload.
	checkEvery = 8 << 20
)

// create opens the file for writing, keeps the metadata, and empties it if there will be space.
func create(user *users.User, path string, kept map[string]string, announced int64) (*os.File, error) {
	var file *os.File
	existed := false
	err := user.Within([]string{path}, func(raised bool) (err error) {
		file, existed, err = openFor(user, path, raised)
		return err
	})
	if err != nil {
		return nil, err
	}
	var stat unix.Stat_t
	if err = unix.Fstat(int(file.Fd()), &stat); err == nil && stat.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("path '%s' %w", path, errNotRegular)
	}
	if err == nil {
		err = EnoughSpace(int(file.Fd()), announced-stat.Blocks*statBlock)
	}
	if err == nil {
		err = metadata.Replace(file, kept)
	}
	if err == nil && stat.Size > 0 {
		err = file.Truncate(0)
	}
	if err == nil {
		return file, nil
	}
	if existed {
		_ = file.Close()
	} else {
		withdraw(user, path, file)
	}
	return nil, err
}

// openFor opens a file for writing, and tells whether it was there before.
func openFor(user *users.User, path string, raised bool) (*os.File, bool, error) {
	if err := user.MakeDirs(filepath.Dir(path), raised); err != nil {
		return nil, false, err
	}
	info, err := os.Stat(path)
	existed := err == nil
	if existed && !info.Mode().IsRegular() {
		return nil, existed, fmt.Errorf("path '%s' %w", path, errNotRegular)
	}
	flags, group := os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, -1
	if raised {
		// Where a link leads, others may be at home.
		flags, group = flags|unix.O_NOFOLLOW, int(user.GID)
	}
	file, err := os.OpenFile(path, flags, 0o644)
	if err == nil && !existed {
		// Else it is the user's already, but who watches expects to see it told.
		_ = file.Chown(int(user.UID), group)
	}
	return file, existed, err
}

// withdraw removes what an upload has left, at the end of whatever links lead there.
func withdraw(user *users.User, path string, file *os.File) {
	defer file.Close()
	_ = file.Truncate(0)
	mine, err := file.Stat()
	if err != nil {
		return
	}
	_ = user.Within([]string{path}, func(bool) error {
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		if info, err := os.Lstat(target); err != nil || !os.SameFile(info, mine) {
			return err
		}
		return os.Remove(target)
	})
}

// content marks the errors of what a client sends, to tell them from those of the disk.
type content struct{ io.Reader }

func (c content) Read(buffer []byte) (int, error) {
	n, err := c.Reader.Read(buffer)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", errCut, err)
	}
	return n, err
}

func copyChecked(to *os.File, from io.Reader) error {
	block, err := NewBlock()
	if err != nil {
		return err
	}
	defer block.Free()
	return block.Store(to, from)
}

// Store copies what comes to a file that is empty, and looks at the free space on the way.
func (b *Block) Store(to *os.File, from io.Reader) error {
	for unchecked := 0; ; {
		n, err := io.ReadFull(content{from}, b.bytes)
		// Compared as they are: content that is cut short wraps the same error.
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return err
		}
		if writeErr := b.writeTo(to, n); writeErr != nil || err != nil {
			return writeErr
		}
		// What comes before the next look fits into what is kept free.
		if unchecked += n; unchecked >= checkEvery {
			if err := EnoughSpace(int(to.Fd()), 0); err != nil {
				return err
			}
			unchecked = 0
		}
	}
}

// EnoughSpace makes sure that so many bytes more leave a reserve on the file system of fd.
func EnoughSpace(fd int, wanted int64) error {
	var stat unix.Statfs_t
	if err := unix.Fstatfs(fd, &stat); err != nil {
		return err
	}
	if stat.Blocks == 0 {
		return nil // the kernel's own files take no space
	}
	kept := min(reserve, int64(stat.Blocks)*stat.Bsize/reservePart)
	if left := int64(stat.Bavail) * stat.Bsize; max(wanted, 0) > left-kept {
		return fmt.Errorf("%d bytes are left, of which %d are kept free: %w", left, kept, syscall.ENOSPC)
	}
	return nil
}
