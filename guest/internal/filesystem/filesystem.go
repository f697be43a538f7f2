// Package filesystem serves filesystem.Filesystem with the rights of the user who asks.
package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/gen/filesystem/filesystemconnect"
	"sandmartin.dev/guest/internal/users"
)

const (
	maxEntries = 50_000
	maxDepth   = 64
)

var errTooMany = fmt.Errorf("more than %d entries; list a smaller directory or depth", maxEntries)

// Locate finds the user a request asks for and the absolute path it means.
type Locate func(header http.Header, path string) (*users.User, string, error)

// Service works on the guest's files. Watching is not implemented yet.
type Service struct {
	filesystemconnect.UnimplementedFilesystemHandler
	locate Locate
}

// NewService returns a service that finds users and paths by locate.
func NewService(locate Locate) *Service { return &Service{locate: locate} }

// at runs work as the user of the request, with every path made absolute.
func (s *Service) at(header http.Header, paths []string, work func(user *users.User, paths []string) error) error {
	var user *users.User
	absolute := make([]string, len(paths))
	for i, path := range paths {
		if path == "" || strings.ContainsRune(path, 0) {
			return connect.NewError(connect.CodeInvalidArgument, errors.New("the path is empty or contains a NUL character"))
		}
		var err error
		if user, absolute[i], err = s.locate(header, path); err != nil {
			return connect.NewError(connect.CodeUnauthenticated, err)
		}
	}
	return toConnect(user.As(func() error { return work(user, absolute) }))
}

func toConnect(err error) error {
	var known *connect.Error
	switch {
	case err == nil, errors.As(err, &known):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, fs.ErrExist):
		return connect.NewError(connect.CodeAlreadyExists, err)
	case errors.Is(err, fs.ErrPermission):
		return connect.NewError(connect.CodePermissionDenied, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EISDIR):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.EROFS):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

// describe returns what is known of the file at path, called shown. For a link the type is its
// target's. Names need not be text, but what is sent must be.
func describe(path, shown string, names *users.Names) (*filesystempb.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	entry := &filesystempb.EntryInfo{
		Name: text(filepath.Base(shown)), Path: text(shown), Type: typeOf(info.Mode()), Size: info.Size(),
		Mode: uint32(stat.Mode & 0o7777), Permissions: permissions(info.Mode()),
		Owner: names.User(stat.Uid), Group: names.Group(stat.Gid),
		ModifiedTime: timestamppb.New(info.ModTime()),
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		return entry, nil
	}
	entry.IsSymlink = true
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		target, err = os.Readlink(path)
	}
	if err == nil {
		target = text(target)
		entry.SymlinkTarget = &target
	}
	if followed, err := os.Stat(path); err == nil {
		entry.Type = typeOf(followed.Mode())
	}
	return entry, nil
}

func text(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

func typeOf(mode fs.FileMode) filesystempb.FileType {
	switch {
	case mode.IsRegular():
		return filesystempb.FileType_FILE_TYPE_FILE
	case mode.IsDir():
		return filesystempb.FileType_FILE_TYPE_DIRECTORY
	case mode&fs.ModeSymlink != 0:
		return filesystempb.FileType_FILE_TYPE_SYMLINK
	}
	return filesystempb.FileType_FILE_TYPE_UNSPECIFIED
}

func permissions(mode fs.FileMode) string {
	kind := "-"
	switch {
	case mode.IsDir():
		kind = "d"
	case mode&fs.ModeSymlink != 0:
		kind = "l"
	}
	return kind + mode.Perm().String()[1:]
}

// Stat describes one file.
func (s *Service) Stat(_ context.Context, r *connect.Request[filesystempb.StatRequest]) (*connect.Response[filesystempb.StatResponse], error) {
	answer := &filesystempb.StatResponse{}
	err := s.at(r.Header(), []string{r.Msg.GetPath()}, func(_ *users.User, paths []string) (err error) {
		answer.Entry, err = describe(paths[0], paths[0], users.NewNames())
		return err
	})
	return connect.NewResponse(answer), err
}

// MakeDir makes a directory and its missing parents, all owned by the user.
func (s *Service) MakeDir(_ context.Context, r *connect.Request[filesystempb.MakeDirRequest]) (*connect.Response[filesystempb.MakeDirResponse], error) {
	answer := &filesystempb.MakeDirResponse{}
	err := s.at(r.Header(), []string{r.Msg.GetPath()}, func(_ *users.User, paths []string) error {
		info, err := os.Stat(paths[0])
		switch {
		case err == nil && info.IsDir():
			return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("path already exists: %s", paths[0]))
		case err == nil:
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path already exists but it is not a directory: %s", paths[0]))
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		if err := os.MkdirAll(paths[0], 0o755); err != nil {
			return err
		}
		answer.Entry, err = describe(paths[0], paths[0], users.NewNames())
		return err
	})
	return connect.NewResponse(answer), err
}

// Move renames a file or directory; the destination's parents are made.
func (s *Service) Move(_ context.Context, r *connect.Request[filesystempb.MoveRequest]) (*connect.Response[filesystempb.MoveResponse], error) {
	answer := &filesystempb.MoveResponse{}
	both := []string{r.Msg.GetSource(), r.Msg.GetDestination()}
	err := s.at(r.Header(), both, func(_ *users.User, paths []string) error {
		if _, err := os.Lstat(paths[0]); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(paths[1]), 0o755); err != nil {
			return err
		}
		if err := os.Rename(paths[0], paths[1]); err != nil {
			return err
		}
		var err error
		answer.Entry, err = describe(paths[1], paths[1], users.NewNames())
		return err
	})
	return connect.NewResponse(answer), err
}

// Remove deletes a file or a whole tree.
func (s *Service) Remove(_ context.Context, r *connect.Request[filesystempb.RemoveRequest]) (*connect.Response[filesystempb.RemoveResponse], error) {
	err := s.at(r.Header(), []string{r.Msg.GetPath()}, func(_ *users.User, paths []string) error {
		return os.RemoveAll(paths[0])
	})
	return connect.NewResponse(&filesystempb.RemoveResponse{}), err
}

// ListDir describes what is below a directory, down to the depth that is asked for.
func (s *Service) ListDir(_ context.Context, r *connect.Request[filesystempb.ListDirRequest]) (*connect.Response[filesystempb.ListDirResponse], error) {
	answer := &filesystempb.ListDirResponse{}
	depth := max(1, int(r.Msg.GetDepth()))
	if depth > maxDepth {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("depth %d is above %d", depth, maxDepth))
	}
	err := s.at(r.Header(), []string{r.Msg.GetPath()}, func(_ *users.User, paths []string) error {
		root, err := filepath.EvalSymlinks(paths[0])
		if err != nil {
			return err
		}
		info, err := os.Stat(root)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: %s", paths[0]))
		}
		return (&listing{names: users.NewNames(), left: maxEntries, answer: answer}).add(root, paths[0], depth)
	})
	return connect.NewResponse(answer), err
}

// listing collects entries; left is how many more may be answered.
type listing struct {
	names  *users.Names
	left   int
	answer *filesystempb.ListDirResponse
}

// add lists a directory but names what it finds below shown, the path that was asked for.
func (l *listing) add(directory, shown string, depth int) error {
	found, err := l.read(directory)
	if err != nil {
		return err
	}
	for _, child := range found {
		path, shownPath := filepath.Join(directory, child.Name()), filepath.Join(shown, child.Name())
		// What vanished or is closed to the user is left out, and does not spoil the rest.
		entry, err := describe(path, shownPath, l.names)
		if err != nil {
			continue
		}
		l.answer.Entries = append(l.answer.Entries, entry)
		if !child.IsDir() || depth <= 1 {
			continue
		}
		if err := l.add(path, shownPath, depth-1); errors.Is(err, errTooMany) {
			return err
		}
	}
	return nil
}

// read returns the sorted entries of a directory, but no more than may still be answered: a
// directory can be larger than the memory.
func (l *listing) read(directory string) ([]fs.DirEntry, error) {
	opened, err := os.Open(directory)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	found, err := opened.ReadDir(l.left + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if l.left -= len(found); l.left < 0 {
		return nil, connect.NewError(connect.CodeResourceExhausted, errTooMany)
	}
	slices.SortFunc(found, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return found, nil
}
