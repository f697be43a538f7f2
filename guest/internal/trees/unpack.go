package trees

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/files"
)

const (
	readAhead = 64 << 10
	// Directories whose times are set at once: until then they are remembered.
	maxTimes = 1 << 16
	// How often the place of a name is cleared for what somebody else puts there again.
	maxTries = 5
	// Old tars know a file that should lie in one piece.
	typeContiguous = '7'
)

var errCut = errors.New("the tar is cut off")

// unpacker is one tree on its way in.
type unpacker struct {
	walker
	// Open from the destination, which is the first, to where the last member went.
	steps []step
	block *files.Block
	// Of directories, which change with all that is put there.
	times []dated
}

type step struct {
	directory
	name string
}

type dated struct {
	names    []string
	modified time.Time
}

// unpack writes the members of a tar below a directory, which is made if it is missing, and tells
// how many that were. On an error what was unpacked before stays.
func unpack(from io.Reader, directory string, given *owner) (members int, err error) {
	block, err := files.NewBlock()
	if err != nil {
		return 0, err
	}
	defer block.Free()
	u := &unpacker{walker: walker{owner: given, brought: map[inode]struct{}{}}, block: block}
	defer u.leave(0)
	if err := u.begin(directory); err != nil {
		return 0, fmt.Errorf("directory '%s': %w", directory, err)
	}
	defer u.setTimes()
	source := &ending{from: bufio.NewReaderSize(from, readAhead)}
	for content := tar.NewReader(source); ; {
		header, err := content.Next()
		if err == io.EOF {
			return members, source.finish()
		}
		if err != nil {
			return members, source.explain(err)
		}
		if header.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := u.put(header, content); err != nil {
			return members, fmt.Errorf("'%s': %w", shown(header.Name), source.explain(err))
		}
		members++
	}
}

// ending is a tar on its way, which tells whether it came to its own end.
type ending struct {
	from io.Reader
	err  error
}

func (e *ending) Read(buffer []byte) (n int, err error) {
	n, err = e.from.Read(buffer)
	if err != nil {
		e.err = err
	}
	return n, err
}

// finish reads what follows the last member. A tar that ends without its mark may have been longer.
func (e *ending) finish() error {
	if e.err != nil {
		return e.explain(e.err)
	}
	_, err := io.Copy(io.Discard, e.from)
	return err
}

// explain returns why nothing more came, if that is what an error comes from.
func (e *ending) explain(err error) error {
	switch {
	case e.err == nil:
		return err
	case errors.Is(e.err, io.EOF), errors.Is(e.err, io.ErrUnexpectedEOF):
		return files.Invalid(errCut.Error())
	}
	return e.err
}

func (u *unpacker) begin(directory string) error {
	names, err := namesOf(directory[1:])
	if err != nil {
		return err
	}
	root, err := u.root()
	if err != nil {
		return err
	}
	destination, err := u.walk(root, names)
	if len(names) > 0 {
		root.close()
	}
	if err == nil {
		u.steps = []step{{directory: destination}}
	}
	return err
}

// enter opens the directory at names below the destination; the way that it has in common with the
// last one is not gone again.
func (u *unpacker) enter(names []string, make bool) (directory, error) {
	known := 1
	for known <= len(names) && known < len(u.steps) && u.steps[known].name == names[known-1] {
		known++
	}
	u.leave(known)
	for _, name := range names[known-1:] {
		next, err := u.step(u.last(), name, make)
		if err != nil {
			return directory{}, fmt.Errorf("'%s': %w", name, err)
		}
		u.steps = append(u.steps, step{next, name})
	}
	return u.last(), nil
}

func (u *unpacker) last() directory { return u.steps[len(u.steps)-1].directory }

// leave closes all but the first steps.
func (u *unpacker) leave(first int) {
	for _, each := range u.steps[min(first, len(u.steps)):] {
		each.close()
	}
	u.steps = u.steps[:min(first, len(u.steps))]
}

// put makes one member.
func (u *unpacker) put(header *tar.Header, content io.Reader) error {
	names, err := namesOf(header.Name)
	if err != nil {
		return err
	}
	whose, err := u.owner.or(header)
	if err != nil {
		return err
	}
	if header.Typeflag == tar.TypeDir {
		return u.putDirectory(names, header, whose)
	}
	if len(names) == 0 {
		return files.Invalid("it has no name of its own")
	}
	switch header.Typeflag {
	case tar.TypeReg, typeContiguous:
		return u.putFile(names, header, whose, content)
	case tar.TypeSymlink:
		return u.putLink(names, header, whose)
	case tar.TypeLink:
		return u.putHardLink(names, header, whose)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return files.Invalid("it is a device or a pipe")
	}
	return files.Invalid(fmt.Sprintf("it is of a kind that is not known here, %q", header.Typeflag))
}

func (u *unpacker) putDirectory(names []string, header *tar.Header, whose owner) error {
	safe := false
	if len(names) > 0 {
		parent, err := u.enter(names[:len(names)-1], true)
		if err != nil {
			return err
		}
		safe = parent.trust == guarded
	}
	here, err := u.enter(names, true)
	if err != nil {
		return err
	}
	// The destination itself and what links lead to are nothing that the tree tells of. And where
	// others may have put a directory, or put another in its place, none is given away.
	theirs := !safe && !belongs(here.fd, whose)
	if !here.made && (here.linked || len(names) == 0 || theirs) {
		return nil
	}
	if err := give(here.fd, whose, header.Mode); err != nil {
		return err
	}
	u.reclassify()
	if len(u.times) >= maxTimes {
		u.setTimes()
	}
	u.times = append(u.times, dated{slices.Clone(names), header.ModTime})
	return nil
}

// reclassify finds out anew who can change what is in the last directory.
func (u *unpacker) reclassify() {
	var stat unix.Stat_t
	here := &u.steps[len(u.steps)-1]
	if unix.Fstat(here.fd, &stat) != nil {
		here.trust = exposed
		return
	}
	here.trust = trustIn(here.trust, &stat)
}

func belongs(fd int, whose owner) bool {
	var stat unix.Stat_t
	return unix.Fstat(fd, &stat) == nil && stat.Uid == uint32(whose.uid)
}

// setTimes gives the directories the times they had, now that what they hold is there.
func (u *unpacker) setTimes() {
	for _, each := range u.times {
		if here, err := u.enter(each.names, false); err == nil {
			_ = setTime(here.fd, each.modified)
		}
	}
	u.times = u.times[:0]
}

func (u *unpacker) putFile(names []string, header *tar.Header, whose owner, content io.Reader) error {
	parent, name, err := u.parent(names)
	if err != nil {
		return err
	}
	if err := files.EnoughSpace(parent.fd, header.Size); err != nil {
		return err
	}
	fd := -1
	err = u.inPlaceOf(parent, name, func() (err error) {
		fd, err = openAt(parent.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close()
	err = u.block.Store(file, content)
	if err == nil {
		err = give(fd, whose, header.Mode)
	}
	if err == nil {
		err = setTime(fd, header.ModTime)
	}
	if err != nil {
		withdraw(parent, name, fd)
	}
	return err
}

// withdraw removes a file that is not whole, if it still has its name.
func withdraw(parent directory, name string, fd int) {
	var mine, there unix.Stat_t
	if unix.Fstat(fd, &mine) != nil || unix.Fstatat(parent.fd, name, &there, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return
	}
	if inodeOf(&mine) == inodeOf(&there) {
		_ = unix.Unlinkat(parent.fd, name, 0)
	}
}

func (u *unpacker) parent(names []string) (directory, string, error) {
	last := len(names) - 1
	parent, err := u.enter(names[:last], true)
	return parent, names[last], err
}

// inPlaceOf has something made under a name that is taken by nothing, or by what is given up for it.
func (u *unpacker) inPlaceOf(parent directory, name string, create func() error) error {
	for try := 0; ; try++ {
		err := create()
		if !errors.Is(err, unix.EEXIST) || try == maxTries {
			return err
		}
		var stat unix.Stat_t
		if err = unix.Fstatat(parent.fd, name, &stat, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			if stat.Mode&unix.S_IFMT == unix.S_IFDIR {
				return files.Invalid("a directory is there")
			}
			delete(u.brought, inodeOf(&stat))
			err = unix.Unlinkat(parent.fd, name, 0)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
}

func (u *unpacker) putLink(names []string, header *tar.Header, whose owner) error {
	if header.Linkname == "" {
		return files.Invalid("it is a link that leads nowhere")
	}
	if len(u.brought) >= maxLinks {
		return files.Invalid(fmt.Sprintf("it is one of more than %d links", maxLinks))
	}
	parent, name, err := u.parent(names)
	if err != nil {
		return err
	}
	err = u.inPlaceOf(parent, name, func() error { return unix.Symlinkat(header.Linkname, parent.fd, name) })
	if err != nil {
		return err
	}
	// Only what is certainly a link is given away: somebody may have put something else there.
	fd, stat, err := look(parent, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if stat.Mode&unix.S_IFMT != unix.S_IFLNK {
		return files.Invalid("it was replaced as it was made")
	}
	u.brought[inodeOf(&stat)] = struct{}{}
	if err := unix.Fchownat(fd, "", whose.uid, whose.gid, unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	return setTime(fd, header.ModTime)
}

// look opens whatever has a name, for nothing but to look at it.
func look(parent directory, name string) (fd int, stat unix.Stat_t, err error) {
	if fd, err = openAt(parent.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err != nil {
		return fd, stat, err
	}
	if err = unix.Fstat(fd, &stat); err != nil {
		_ = unix.Close(fd)
	}
	return fd, stat, err
}

// putHardLink gives a file of the tree another name.
func (u *unpacker) putHardLink(names []string, header *tar.Header, whose owner) error {
	source, err := namesOf(header.Linkname)
	if err != nil || len(source) == 0 {
		return files.Invalid(fmt.Sprintf("it is a hard link to '%s', which is no name in the tree", shown(header.Linkname)))
	}
	from, err := u.enter(source[:len(source)-1], false)
	if err != nil {
		return fmt.Errorf("hard link to '%s': %w", shown(header.Linkname), err)
	}
	fd, stat, err := look(from, source[len(source)-1])
	if err != nil {
		return fmt.Errorf("hard link to '%s': %w", shown(header.Linkname), err)
	}
	defer unix.Close(fd)
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return files.Invalid(fmt.Sprintf("it is a hard link to '%s', which is no file", shown(header.Linkname)))
	}
	parent, name, err := u.parent(names)
	if err != nil {
		return err
	}
	// Where others can put another file in the place of the first, it must not get a better one.
	if from.trust == exposed && (parent.trust != exposed || stat.Uid != uint32(whose.uid)) {
		return files.Invalid(fmt.Sprintf("it is a hard link to '%s', in whose place others than root may put another", shown(header.Linkname)))
	}
	var there unix.Stat_t
	err = unix.Fstatat(parent.fd, name, &there, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && inodeOf(&there) == inodeOf(&stat) {
		return nil
	}
	return u.inPlaceOf(parent, name, func() error {
		return unix.Linkat(fd, "", parent.fd, name, unix.AT_EMPTY_PATH)
	})
}

// give sets who owns what is open, and then its mode: to change the owner takes setuid bits off.
func give(fd int, whose owner, mode int64) error {
	if err := unix.Fchown(fd, whose.uid, whose.gid); err != nil {
		return err
	}
	return unix.Fchmod(fd, uint32(mode&0o7777))
}

// setTime sets when what is open was last read and changed.
func setTime(fd int, modified time.Time) error {
	at := unix.Timespec{Sec: modified.Unix(), Nsec: int64(modified.Nanosecond())}
	return unix.UtimesNanoAt(fd, "", []unix.Timespec{at, at}, unix.AT_EMPTY_PATH)
}
