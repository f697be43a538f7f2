package filesystem

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"connectrpc.com/connect"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/users"
)

func service(t *testing.T) *Service {
	t.Helper()
	me, err := users.Find(strconv.Itoa(os.Getuid()))
	if err != nil {
		t.Fatal(err)
	}
	return NewService(func(_ http.Header, path string) (*users.User, string, error) { return me, path, nil })
}

func tree(t *testing.T, paths ...string) string {
	t.Helper()
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, "/") {
			err = os.MkdirAll(full, 0o755)
		} else {
			err = os.WriteFile(full, nil, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestListingDepth(t *testing.T) {
	root := tree(t, "b.txt", "a/1/x", "a/2", "c/")
	// A link that leads back up is shown and not followed.
	if err := os.Symlink("..", filepath.Join(root, "a", "up")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(root, root+"-link"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(root + "-link") })
	all := "a a/1 a/1/x a/2 a/up b.txt c"
	for _, c := range []struct {
		path     string
		depth    uint32
		expected string
	}{
		{root, 0, "a b.txt c"}, {root, 1, "a b.txt c"}, {root, 2, "a a/1 a/2 a/up b.txt c"},
		{root, 3, all}, {root, maxDepth, all}, {root + "-link", 2, "a a/1 a/2 a/up b.txt c"},
	} {
		answer, err := service(t).ListDir(context.Background(), connect.NewRequest(&filesystempb.ListDirRequest{Path: c.path, Depth: c.depth}))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, entry := range answer.Msg.GetEntries() {
			got = append(got, strings.TrimPrefix(entry.GetPath(), c.path+"/"))
			if entry.GetName() != filepath.Base(entry.GetPath()) {
				t.Errorf("%s is called %s", entry.GetPath(), entry.GetName())
			}
		}
		if shown := strings.Join(got, " "); shown != c.expected {
			t.Errorf("depth %d of %s: %s", c.depth, c.path, shown)
		}
	}
}

func TestListingIsBounded(t *testing.T) {
	root := tree(t, "a/1", "a/2", "b/1", "b/2")
	for left, expected := range map[int]error{6: nil, 5: errTooMany, 1: errTooMany} {
		l := &listing{names: users.NewNames(), left: left, leftBytes: maxBytes, answer: &filesystempb.ListDirResponse{}}
		if err := l.add(root, root, 2); !errors.Is(err, expected) || len(l.answer.GetEntries()) > left {
			t.Errorf("with %d left: %d entries, %v", left, len(l.answer.GetEntries()), err)
		}
	}
}

func TestCodes(t *testing.T) {
	root := tree(t, "file", "dir/full")
	if err := os.Symlink("loop", filepath.Join(root, "loop")); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(root, name) }
	s, ctx := service(t), context.Background()
	stat := func(path string) error {
		_, err := s.Stat(ctx, connect.NewRequest(&filesystempb.StatRequest{Path: path}))
		return err
	}
	list := func(path string, depth uint32) error {
		_, err := s.ListDir(ctx, connect.NewRequest(&filesystempb.ListDirRequest{Path: path, Depth: depth}))
		return err
	}
	makeDir := func(path string) error {
		_, err := s.MakeDir(ctx, connect.NewRequest(&filesystempb.MakeDirRequest{Path: path}))
		return err
	}
	move := func(from, to string) error {
		_, err := s.Move(ctx, connect.NewRequest(&filesystempb.MoveRequest{Source: from, Destination: to}))
		return err
	}
	for name, c := range map[string]struct {
		err  error
		code connect.Code
	}{
		"stat missing":           {stat(at("none")), connect.CodeNotFound},
		"stat below a file":      {stat(at("file/x")), connect.CodeInvalidArgument},
		"stat NUL":               {stat("a\x00b"), connect.CodeInvalidArgument},
		"stat nothing":           {stat(""), connect.CodeInvalidArgument},
		"stat too long":          {stat("/" + strings.Repeat("x", 300)), connect.CodeInvalidArgument},
		"list missing":           {list(at("none"), 1), connect.CodeNotFound},
		"list a file":            {list(at("file"), 1), connect.CodeInvalidArgument},
		"list too deep":          {list(root, maxDepth+1), connect.CodeInvalidArgument},
		"make what is":           {makeDir(at("dir")), connect.CodeAlreadyExists},
		"make over a file":       {makeDir(at("file")), connect.CodeInvalidArgument},
		"make in a loop":         {makeDir(at("loop/x")), connect.CodeInvalidArgument},
		"move missing":           {move(at("none"), at("new/x")), connect.CodeNotFound},
		"move over a full dir":   {move(at("file"), at("dir")), connect.CodeAlreadyExists},
		"move into itself":       {move(at("dir"), at("dir/full/x")), connect.CodeInvalidArgument},
		"move between two disks": {move("/proc/self/status", at("x")), connect.CodeFailedPrecondition},
	} {
		if connect.CodeOf(c.err) != c.code {
			t.Errorf("%s: %v is not %v", name, c.err, c.code)
		}
	}
	if _, err := os.Stat(at("new")); err == nil {
		t.Error("a move that failed has made a directory")
	}
}

func TestNamesThatAreNoText(t *testing.T) {
	root := tree(t, "\xff.bin")
	if err := os.Symlink("\xfe", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	answer, err := service(t).ListDir(context.Background(), connect.NewRequest(&filesystempb.ListDirRequest{Path: root}))
	if err != nil {
		t.Fatal(err)
	}
	link, odd := answer.Msg.GetEntries()[0], answer.Msg.GetEntries()[1]
	if odd.GetName() != "\uFFFD.bin" || link.GetSymlinkTarget() != "\uFFFD" || link.GetType() != filesystempb.FileType_FILE_TYPE_SYMLINK {
		t.Errorf("got %v and %v", odd, link)
	}
}
