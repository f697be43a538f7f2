package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/users"
)

const (
	maxEntries = 50_000
	// Of one answer: names and metadata may be long.
	maxBytes = 16 << 20
	maxDepth = 64
)

var errTooMany = fmt.Errorf("more than %d entries or %d bytes; list a smaller directory or depth", maxEntries, maxBytes)

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
		return (&listing{names: users.NewNames(), left: maxEntries, leftBytes: maxBytes, answer: answer}).add(root, paths[0], depth)
	})
	return connect.NewResponse(answer), err
}

// listing collects entries; left and leftBytes are how many more may be answered.
type listing struct {
	names     *users.Names
	left      int
	leftBytes int
	answer    *filesystempb.ListDirResponse
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
		if l.leftBytes -= proto.Size(entry); l.leftBytes < 0 {
			return connect.NewError(connect.CodeResourceExhausted, errTooMany)
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
