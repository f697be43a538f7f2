package trees

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/files"
)

const (
	writeBehind = 64 << 10
	// How many names of a directory are read at once: it may have millions.
	batch = 256
	// Deeper trees are refused: each level is a descriptor and a batch of names.
	maxLevels = 1000
	// Of files with several names, and of the names: what comes later is given as files of their own.
	maxShared     = 64 << 10
	maxSharedSize = 8 << 20
)

// source is what a tree is read from, and where that is.
type source struct {
	parent directory
	// In its parent, and in the tar.
	entry, name string
}

// find opens the directory above what is to be read. Of a path links are followed but in its last
// part.
func find(at string) (*source, error) {
	above, entry := path.Split(at)
	name := entry
	if entry == "" {
		entry, name = ".", "."
	}
	fd, err := openAt(unix.AT_FDCWD, above, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "read", Path: at, Err: err}
	}
	found := &source{directory{fd: fd}, entry, name}
	var stat unix.Stat_t
	err = unix.Fstatat(fd, entry, &stat, unix.AT_SYMLINK_NOFOLLOW)
	switch kind := stat.Mode & unix.S_IFMT; {
	case err != nil:
		err = &os.PathError{Op: "read", Path: at, Err: err}
	case kind != unix.S_IFDIR && kind != unix.S_IFREG && kind != unix.S_IFLNK:
		err = files.Invalid(fmt.Sprintf("'%s' is neither a file, a directory nor a link", at))
	}
	if err != nil {
		found.close()
		return nil, err
	}
	return found, nil
}

func (s *source) close() { s.parent.close() }

// pack writes the tree as a tar.
func (s *source) pack(ctx context.Context, w io.Writer) error {
	block, err := files.NewBlock()
	if err != nil {
		return err
	}
	defer block.Free()
	behind := bufio.NewWriterSize(w, writeBehind)
	p := &packer{ctx: ctx, tar: tar.NewWriter(behind), block: block, shared: map[inode]string{}}
	if err := p.add(s.parent.fd, s.entry, s.name, 0); err != nil {
		return err
	}
	if err := p.tar.Close(); err != nil {
		return err
	}
	return behind.Flush()
}

type packer struct {
	ctx   context.Context
	tar   *tar.Writer
	block *files.Block
	// Where the content of files with several names is.
	shared     map[inode]string
	sharedSize int
	device     uint64
}

// add packs what a directory calls entry. What is gone meanwhile, and what is neither file, directory
// nor link, is left out.
func (p *packer) add(parent int, entry, name string, level int) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	var stat unix.Stat_t
	err := unix.Fstatat(parent, entry, &stat, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil {
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			err = p.addDirectory(parent, entry, name, level)
		case unix.S_IFREG:
			err = p.addFile(parent, entry, name)
		case unix.S_IFLNK:
			err = p.addLink(parent, entry, name, &stat)
		}
	}
	if level > 0 && errors.Is(err, errGone) {
		return nil
	}
	return err
}

// errGone is what errors about what is not there any more are, and is another thing by now.
var errGone = errors.New("it has changed while it was read")

func gone(name string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("'%s': %w", shown(name), errGone)
	}
	return &os.PathError{Op: "read", Path: shown(name), Err: err}
}

func headerOf(name string, stat *unix.Stat_t) *tar.Header {
	return &tar.Header{
		Name:    name,
		Mode:    int64(stat.Mode & 0o7777),
		Uid:     int(stat.Uid),
		Gid:     int(stat.Gid),
		ModTime: time.Unix(stat.Mtim.Sec, 0),
	}
}

func (p *packer) addDirectory(parent int, entry, name string, level int) error {
	if level >= maxLevels {
		return fmt.Errorf("'%s': more than %d directories deep", shown(name), maxLevels)
	}
	fd, err := openAt(parent, entry, directoryFlags, 0)
	if err != nil {
		return gone(name, err)
	}
	opened := os.NewFile(uintptr(fd), name)
	defer opened.Close()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return gone(name, err)
	}
	header := headerOf(name+"/", &stat)
	header.Typeflag = tar.TypeDir
	if err := p.tar.WriteHeader(header); err != nil {
		return err
	}
	if level == 0 {
		p.device = uint64(stat.Dev)
	}
	if uint64(stat.Dev) != p.device {
		// What is mounted there is no part of the tree.
		return nil
	}
	return p.addAll(opened, strings.TrimPrefix(name+"/", "./"), level+1)
}

func (p *packer) addAll(opened *os.File, prefix string, level int) error {
	for {
		entries, err := opened.Readdirnames(batch)
		for _, entry := range entries {
			if err := p.add(int(opened.Fd()), entry, prefix+entry, level); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return gone(prefix, err)
		}
	}
}

func (p *packer) addLink(parent int, entry, name string, stat *unix.Stat_t) error {
	buffer := make([]byte, maxPath)
	n, err := unix.Readlinkat(parent, entry, buffer)
	if errors.Is(err, unix.EINVAL) {
		err = unix.ENOENT // it is no link any more
	}
	if err != nil {
		return gone(name, err)
	}
	header := headerOf(name, stat)
	header.Typeflag, header.Linkname = tar.TypeSymlink, string(buffer[:n])
	return p.tar.WriteHeader(header)
}

func (p *packer) addFile(parent int, entry, name string) error {
	// Not blocking: it may be a named pipe by now.
	fd, err := openAt(parent, entry, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return gone(name, err)
	}
	opened := os.NewFile(uintptr(fd), name)
	defer opened.Close()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil || stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return gone(name, unix.ENOENT)
	}
	header := headerOf(name, &stat)
	header.Typeflag = tar.TypeReg
	if first := p.first(name, &stat); first != "" {
		header.Typeflag, header.Linkname = tar.TypeLink, first
		return p.tar.WriteHeader(header)
	}
	return p.addContent(opened, header, stat.Size)
}

// first is the name under which a file is in the tar already.
func (p *packer) first(name string, stat *unix.Stat_t) string {
	if stat.Nlink < 2 {
		return ""
	}
	which := inodeOf(stat)
	if known, ok := p.shared[which]; ok {
		return known
	}
	if len(p.shared) < maxShared && p.sharedSize+len(name) <= maxSharedSize {
		p.shared[which] = name
		p.sharedSize += len(name)
	}
	return ""
}

// addContent writes a file. A short one is read before its size is told: it may be changing.
func (p *packer) addContent(opened *os.File, header *tar.Header, size int64) error {
	if size < files.BlockSize {
		content, err := p.block.Load(opened)
		if err != nil {
			return gone(header.Name, err)
		}
		header.Size = int64(len(content))
		if err := p.tar.WriteHeader(header); err != nil {
			return err
		}
		_, err = p.tar.Write(content)
		return err
	}
	header.Size = size
	if err := p.tar.WriteHeader(header); err != nil {
		return err
	}
	err := files.Send(p.tar, opened, size)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("'%s' has become shorter while it was read", shown(header.Name))
	}
	return err
}
