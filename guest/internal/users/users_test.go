package users

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
)

func TestResolve(t *testing.T) {
	ann := &User{Name: "ann", Home: "/home/ann"}
	for _, c := range []struct{ name, base, expected string }{
		{"", "", "/home/ann"},
		{"", "/srv", "/srv"},
		{"~", "/srv", "/home/ann"},
		{"~/a/../b", "/srv", "/home/ann/b"},
		{"~bob/a", "", "/home/ann/~bob/a"},
		{"a/./b/", "", "/home/ann/a/b"},
		{"a", "/srv", "/srv/a"},
		{"../../../etc", "/srv", "/etc"},
		{"/a//b/../c", "/srv", "/a/c"},
		{"/../..", "", "/"},
	} {
		if got := ann.Resolve(c.name, c.base); got != c.expected {
			t.Errorf("%q below %q is %q, not %q", c.name, c.base, got, c.expected)
		}
	}
}

// The accounts of this machine, as the standard library sees them.
func TestFindAgreesWithTheSystem(t *testing.T) {
	accounts := 0
	_ = scan("/etc/passwd", 7, func(fields []string) bool {
		accounts++
		expected, err := user.Lookup(fields[0])
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{fields[0], fields[2]} {
			found, err := Find(name)
			if err != nil {
				t.Fatal(err)
			}
			if name == fields[0] && (fmt.Sprint(found.UID, " ", found.GID) != expected.Uid+" "+expected.Gid || found.Home != expected.HomeDir) {
				t.Errorf("%s is %+v, not %+v", name, found, expected)
			}
		}
		groups, err := expected.GroupIds()
		if err != nil {
			t.Fatal(err)
		}
		found, _ := Find(fields[0])
		for _, gid := range found.Groups {
			if !slices.Contains(groups, strconv.Itoa(int(gid))) {
				t.Errorf("%s is not in group %d", fields[0], gid)
			}
		}
		if len(found.Groups) != len(groups) {
			t.Errorf("%s is in %v, not in %v", fields[0], groups, found.Groups)
		}
		return true
	})
	if accounts == 0 {
		t.Fatal("there are no accounts to compare")
	}
}

func TestUnknownUsers(t *testing.T) {
	for _, name := range []string{"nobody-knows-me", "-1", "4294967295", "4294967296", "99999999999", "1 2", "", "root:x"} {
		if found, err := Find(name); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q is %+v, %v", name, found, err)
		}
	}
	// A number need not have an account.
	if found, err := Find("3999999999"); err != nil || found.UID != 3999999999 || found.GID != 3999999999 {
		t.Errorf("got %+v, %v", found, err)
	}
}

func TestWorkHasTheUsersRightsAndNothingElseHas(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("taking on another user needs root")
	}
	directory := t.TempDir()
	for path := directory; path != os.TempDir(); path = filepath.Dir(path) {
		_ = os.Chmod(path, 0o755)
	}
	secret, shared := filepath.Join(directory, "secret"), filepath.Join(directory, "shared")
	for path, mode := range map[string]os.FileMode{secret: 0o600, shared: 0o640} {
		if err := os.WriteFile(path, []byte("x"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(shared, 0, 4250); err != nil {
		t.Fatal(err)
	}
	stranger := &User{Name: "s", UID: 4242, GID: 4242, Groups: []uint32{4242}}
	member := &User{Name: "m", UID: 4243, GID: 4243, Groups: []uint32{4243, 4250}}
	read := func(path string) func() error {
		return func() error { _, err := os.ReadFile(path); return err }
	}
	var wait sync.WaitGroup
	for range 50 {
		wait.Go(func() {
			if err := stranger.As(read(secret)); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("a stranger reads: %v", err)
			}
			if err := stranger.As(read(shared)); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("a stranger reads the group's: %v", err)
			}
			if err := member.As(read(shared)); err != nil {
				t.Errorf("a member does not read: %v", err)
			}
			if err := read(secret)(); err != nil {
				t.Errorf("our own rights are gone: %v", err)
			}
		})
	}
	wait.Wait()
}
