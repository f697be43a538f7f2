package trees

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/files"
)

const (
	maxDepth = 255
	maxName  = 255
	maxShown = 200
	// Of one path, as the kernel has it.
	maxFollowed = 40
	// Each costs some bytes until the end.
	maxLinks = 250_000

	writableByOthers = 0o022
	implied          = 0o755
	private          = 0o700
	directoryFlags   = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
)

// trust is what others than root can do to what is in a directory.
type trust int

const (
	// Others may change, move and replace it.
	exposed trust = iota
	// Others may add to it, but what is root's stays: /tmp.
	sticky
	// Nothing, nor in any directory above.
	guarded
)

func trustIn(above trust, stat *unix.Stat_t) trust {
	switch {
	case above == exposed || stat.Uid != 0:
		return exposed
	case stat.Mode&writableByOthers == 0:
		return guarded
	case stat.Mode&unix.S_ISVTX != 0:
		return sticky
	}
	return exposed
}

// inode is what a file is, whatever its name.
type inode struct{ device, number uint64 }

func inodeOf(stat *unix.Stat_t) inode { return inode{uint64(stat.Dev), stat.Ino} }

// directory is one that is open.
type directory struct {
	fd    int
	trust trust
	// Made by the walk, or reached by a link.
	made, linked bool
}

func (d directory) close() { _ = unix.Close(d.fd) }

// walker steps from directory to directory.
type walker struct {
	owner *owner
	// Links that the tree itself brought, which are never followed.
	brought  map[inode]struct{}
	followed int
}

// root opens where all paths begin.
func (w *walker) root() (directory, error) {
	fd, err := openAt(unix.AT_FDCWD, "/", directoryFlags, 0)
	if err != nil {
		return directory{}, err
	}
	return classified(fd, guarded)
}

// classified takes an open directory over and finds out who can change what is in it.
func classified(fd int, above trust) (directory, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		_ = unix.Close(fd)
		return directory{}, err
	}
	return directory{fd: fd, trust: trustIn(above, &stat)}, nil
}

// walk goes from a directory, which it leaves open, along names, and makes what is missing.
func (w *walker) walk(from directory, names []string) (directory, error) {
	at := from
	for _, name := range names {
		next, err := w.step(at, name, true)
		if at != from {
			at.close()
		}
		if err != nil {
			return directory{}, fmt.Errorf("'%s': %w", shown(name), err)
		}
		at = next
	}
	return at, nil
}

// step opens the directory called name in another; a missing one is made if that is wanted.
func (w *walker) step(at directory, name string, make bool) (directory, error) {
	w.followed = 0
	return w.open(at, name, make)
}

func (w *walker) open(at directory, name string, make bool) (directory, error) {
	fd, err := openAt(at.fd, name, directoryFlags, 0)
	switch {
	case err == nil:
		return classified(fd, at.trust)
	case errors.Is(err, unix.ENOENT) && make:
		return w.make(at, name)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return w.follow(at, name)
	}
	return directory{}, err
}

// follow opens the directory that a link leads to, if it may be followed.
func (w *walker) follow(at directory, name string) (directory, error) {
	var stat unix.Stat_t
	if err := unix.Fstatat(at.fd, name, &stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return directory{}, err
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
	case unix.S_IFDIR:
		return directory{}, files.Invalid("it was a link, and became a directory while it was opened")
	default:
		return directory{}, files.Invalid("it is there, and is no directory")
	}
	if _, ours := w.brought[inodeOf(&stat)]; ours {
		return directory{}, files.Invalid("it is a link that the tree itself brought")
	}
	// One of another's may have been there before the directory became root's.
	if at.trust != guarded || stat.Uid != 0 {
		return directory{}, files.Invalid("it is a link that others than root may have made; name the path it leads to")
	}
	if w.followed++; w.followed > maxFollowed {
		return directory{}, unix.ELOOP
	}
	buffer := make([]byte, maxPath)
	n, err := unix.Readlinkat(at.fd, name, buffer)
	if err != nil {
		return directory{}, err
	}
	found, err := w.along(at, string(buffer[:n]))
	found.linked = true
	return found, err
}

// along opens the directory at a path that root wrote, as seen from another.
func (w *walker) along(from directory, text string) (at directory, err error) {
	if strings.HasPrefix(text, "/") {
		at, err = w.root()
	} else {
		at, err = w.open(from, ".", false)
	}
	for name := range strings.SplitSeq(text, "/") {
		if err != nil {
			return directory{}, err
		}
		if name == "" || name == "." {
			continue
		}
		before := at
		if name == ".." {
			at, err = above(before)
		} else {
			at, err = w.open(before, name, false)
		}
		before.close()
	}
	return at, err
}

// above opens the directory above one, which nobody may have moved meanwhile.
func above(at directory) (directory, error) {
	if at.trust == exposed {
		return directory{}, files.Invalid("a link leads up from a directory that others than root can move")
	}
	fd, err := openAt(at.fd, "..", directoryFlags, 0)
	if err != nil {
		return directory{}, err
	}
	// All that is above what is trusted was found so too.
	return classified(fd, guarded)
}

// make makes a directory that no member of the tree has told of yet.
func (w *walker) make(at directory, name string) (directory, error) {
	making := unix.Mkdirat(at.fd, name, private)
	if making != nil && !errors.Is(making, unix.EEXIST) {
		return directory{}, making
	}
	fd, err := openAt(at.fd, name, directoryFlags, 0)
	if err != nil {
		return directory{}, err
	}
	ours := making == nil && (at.trust != exposed || isNew(fd))
	if ours {
		if err := w.settle(fd); err != nil {
			_ = unix.Close(fd)
			return directory{}, err
		}
	}
	made, err := classified(fd, at.trust)
	made.made = ours
	return made, err
}

// settle gives a new directory what it has as long as no member says otherwise.
func (w *walker) settle(fd int) error {
	if w.owner != nil {
		if err := unix.Fchown(fd, w.owner.uid, w.owner.gid); err != nil {
			return err
		}
	}
	return unix.Fchmod(fd, implied)
}

// isNew tells whether a directory is as we have just made it. Where others may put another in its
// place, it must be none with something in it that would be shown to them.
func isNew(fd int) bool {
	var stat unix.Stat_t
	if unix.Fstat(fd, &stat) != nil || stat.Uid != uint32(os.Geteuid()) || stat.Mode&0o7777&^unix.S_ISGID != private {
		return false
	}
	return isEmpty(fd)
}

func isEmpty(fd int) bool {
	buffer := make([]byte, maxPath)
	n, err := unix.ReadDirent(fd, buffer)
	if err != nil {
		return false
	}
	_, count, _ := unix.ParseDirent(buffer[:n], -1, nil)
	return count == 0
}

// namesOf takes the name of a member apart; none are the directory itself.
func namesOf(name string) ([]string, error) {
	switch {
	case strings.HasPrefix(name, "/"):
		return nil, files.Invalid("its name is absolute")
	case strings.ContainsRune(name, 0):
		return nil, files.Invalid("its name contains a NUL character")
	case len(name) > maxPath:
		return nil, files.Invalid("its name is longer than 4096 bytes")
	}
	var names []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
		case part == "..":
			return nil, files.Invalid("its name leads up, by '..'")
		case len(part) > maxName:
			return nil, files.Invalid("a part of its name is longer than 255 bytes")
		default:
			names = append(names, part)
		}
	}
	if len(names) > maxDepth {
		return nil, files.Invalid("it is more than 255 directories deep")
	}
	return names, nil
}

// shown is as much of a name as an error needs.
func shown(name string) string {
	if len(name) <= maxShown {
		return name
	}
	return name[:maxShown] + "..."
}

func openAt(fd int, name string, flags int, mode uint32) (int, error) {
	for {
		opened, err := unix.Openat(fd, name, flags, mode)
		if !errors.Is(err, unix.EINTR) {
			return opened, err
		}
	}
}
