// Package filesystem serves filesystem.Filesystem with the rights of the user who asks.
package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
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
	case errors.Is(err, syscall.ENOSPC):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EINVAL):
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

// Describe returns what is known of the file at path. For a link the type is its target's.
func Describe(path string) (*filesystempb.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	entry := &filesystempb.EntryInfo{
		Name: filepath.Base(path), Path: path, Type: typeOf(info.Mode()), Size: info.Size(),
		Mode: uint32(stat.Mode & 0o7777), Permissions: permissions(info.Mode()),
		Owner: users.NameOf(stat.Uid), Group: users.GroupNameOf(stat.Gid),
		ModifiedTime: timestamppb.New(info.ModTime()),
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		return entry, nil
	}
	entry.IsSymlink = true
	if target, err := filepath.EvalSymlinks(path); err == nil {
		entry.SymlinkTarget = &target
	} else if target, err := os.Readlink(path); err == nil {
		entry.SymlinkTarget = &target
	}
	if followed, err := os.Stat(path); err == nil {
		entry.Type = typeOf(followed.Mode())
	}
	return entry, nil
}

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
		answer.Entry, err = Describe(paths[0])
		return err
	})
	return connect.NewResponse(answer), err
}

// MakeDir makes a directory and its missing parents, all owned by the user.
func (s *Service) MakeDir(_ context.Context, r *connect.Request[filesystempb.MakeDirRequest]) (*connect.Response[filesystempb.MakeDirResponse], error) {
	answer := &filesystempb.MakeDirResponse{}
	err := s.at(r.Header(), []string{r.Msg.GetPath()}, func(_ *users.User, paths []string) error {
		if _, err := os.Stat(paths[0]); err == nil {
			return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("path already exists: %s", paths[0]))
		}
		if err := os.MkdirAll(paths[0], 0o755); err != nil {
			return err
		}
		var err error
		answer.Entry, err = Describe(paths[0])
		return err
	})
	return connect.NewResponse(answer), err
}

// Move renames a file or directory; the destination's parents are made.
func (s *Service) Move(_ context.Context, r *connect.Request[filesystempb.MoveRequest]) (*connect.Response[filesystempb.MoveResponse], error) {
	answer := &filesystempb.MoveResponse{}
	both := []string{r.Msg.GetSource(), r.Msg.GetDestination()}
	err := s.at(r.Header(), both, func(_ *users.User, paths []string) error {
		if err := os.MkdirAll(filepath.Dir(paths[1]), 0o755); err != nil {
			return err
		}
		if err := os.Rename(paths[0], paths[1]); err != nil {
			return err
		}
		var err error
		answer.Entry, err = Describe(paths[1])
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
		return list(root, paths[0], depth, answer)
	})
	return connect.NewResponse(answer), err
}

// list walks root but names what it finds below shown, the path that was asked for.
func list(root, shown string, depth int, answer *filesystempb.ListDirResponse) error {
	return filepath.WalkDir(root, func(path string, found fs.DirEntry, err error) error {
		if path == root {
			return err
		}
		// What vanished or is closed to the user is left out, and does not spoil the rest.
		relative, relErr := filepath.Rel(root, path)
		if err != nil || relErr != nil {
			return nil
		}
		entry, err := Describe(path)
		if err != nil {
			return nil
		}
		entry.Path = filepath.Join(shown, relative)
		answer.Entries = append(answer.Entries, entry)
		if len(answer.Entries) > maxEntries {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d entries; list a smaller directory or depth", maxEntries))
		}
		if found.IsDir() && strings.Count(relative, "/")+1 >= depth {
			return fs.SkipDir
		}
		return nil
	})
}
