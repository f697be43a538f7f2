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

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/gen/filesystem/filesystemconnect"
	"sandmartin.dev/guest/internal/users"
)

// Locate finds the user a request asks for and the absolute path it means.
type Locate func(header http.Header, path string) (*users.User, string, error)

// Service works on the guest's files.
type Service struct {
	locate  Locate
	watches watches
}

var _ filesystemconnect.FilesystemHandler = (*Service)(nil)

// NewService returns a service that finds users and paths by locate.
func NewService(locate Locate) *Service { return &Service{locate: locate} }

// at runs work as the user of the request, with every path made absolute.
func (s *Service) at(header http.Header, paths []string, work func(user *users.User, paths []string) error) error {
	user, absolute, err := s.find(header, paths)
	if err != nil {
		return err
	}
	return toConnect(user.As(func() error { return work(user, absolute) }))
}

// change is as at, for work that may be done with root's rights, where these are the request's too.
func (s *Service) change(header http.Header, paths []string, work func(user *users.User, paths []string, raised bool) error) error {
	user, absolute, err := s.find(header, paths)
	if err != nil {
		return err
	}
	return toConnect(user.Within(absolute, func(raised bool) error { return work(user, absolute, raised) }))
}

func (s *Service) find(header http.Header, paths []string) (*users.User, []string, error) {
	var user *users.User
	absolute := make([]string, len(paths))
	for i, path := range paths {
		if path == "" || strings.ContainsRune(path, 0) {
			return nil, nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the path is empty or contains a NUL character"))
		}
		var err error
		if user, absolute[i], err = s.locate(header, path); err != nil {
			return nil, nil, connect.NewError(connect.CodeUnauthenticated, err)
		}
	}
	return user, absolute, nil
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
	err := s.change(r.Header(), []string{r.Msg.GetPath()}, func(user *users.User, paths []string, raised bool) error {
		info, err := os.Stat(paths[0])
		switch {
		case err == nil && info.IsDir():
			return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("path already exists: %s", paths[0]))
		case err == nil:
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path already exists but it is not a directory: %s", paths[0]))
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		if err := user.MakeDirs(paths[0], raised); err != nil {
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
	err := s.change(r.Header(), both, func(user *users.User, paths []string, raised bool) error {
		if _, err := os.Lstat(paths[0]); err != nil {
			return err
		}
		if err := user.MakeDirs(filepath.Dir(paths[1]), raised); err != nil {
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
	err := s.change(r.Header(), []string{r.Msg.GetPath()}, func(_ *users.User, paths []string, _ bool) error {
		return os.RemoveAll(paths[0])
	})
	return connect.NewResponse(&filesystempb.RemoveResponse{}), err
}
