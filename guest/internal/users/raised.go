package users

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const writableByOthers = 0o022

// Within runs work with the rights of the user. Where these do not suffice for a request that is
// Raised, work is run once more with root's, told so: but only if nobody except root can change
// anything on the ways to the paths, so that no program in here can lead it elsewhere.
func (u *User) Within(paths []string, work func(raised bool) error) error {
	err := u.As(func() error { return work(false) })
	if !u.Raised || u.UID == 0 || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	for _, path := range paths {
		if !guarded(path) {
			return err
		}
	}
	return work(true)
}

// guarded tells whether every directory above a path is root's alone to change: no links, no
// other file systems, nothing that others may write to. Of what is not there yet, no one else can
// make anything.
func guarded(path string) bool {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return false
	}
	var root, here unix.Stat_t
	if unix.Lstat("/", &root) != nil {
		return false
	}
	for end := 0; end >= 0; end = next(path, end) {
		err := unix.Lstat(path[:max(end, 1)], &here)
		if errors.Is(err, unix.ENOENT) {
			return true
		}
		if err != nil || here.Mode&unix.S_IFMT != unix.S_IFDIR || here.Dev != root.Dev {
			return false
		}
		if here.Uid != 0 || here.Mode&writableByOthers != 0 {
			return false
		}
	}
	return true
}

// next is where the name after the one that ends at a slash ends at another; -1 at the last.
func next(path string, slash int) int {
	found := strings.IndexByte(path[slash+1:], '/')
	if found < 0 {
		return -1
	}
	return slash + 1 + found
}

// MakeDirs makes a directory and its missing parents. Those that were made with root's rights
// become the user's.
func (u *User) MakeDirs(path string, raised bool) error {
	var missing []string
	for at := path; raised; at = filepath.Dir(at) {
		if _, err := os.Lstat(at); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		missing = append(missing, at)
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	// The innermost first: until the last is given away nobody can put anything else there.
	for _, made := range missing {
		if err := os.Lchown(made, int(u.UID), int(u.GID)); err != nil {
			return err
		}
	}
	return nil
}
