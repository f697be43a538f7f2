package users

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// rootsOwn is a directory that root alone can change, on the way to it too.
func rootsOwn(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	made, err := os.MkdirTemp("/opt", "sandmartin-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(made) })
	if err := os.Chmod(made, 0o755); err != nil {
		t.Fatal(err)
	}
	return made
}

func nobody(raised bool) *User {
	return &User{Name: "nobody", UID: 65534, GID: 65534, Groups: []uint32{65534}, Home: "/", Raised: raised}
}

func write(user *User, path string) error {
	return user.Within([]string{path}, func(raised bool) error {
		if err := user.MakeDirs(filepath.Dir(path), raised); err != nil {
			return err
		}
		return os.WriteFile(path, nil, 0o644)
	})
}

func TestOnlyARaisedUserWritesWhereRootAloneMay(t *testing.T) {
	path := filepath.Join(rootsOwn(t), "new", "deep", "file")
	if err := write(nobody(false), path); !errors.Is(err, fs.ErrPermission) {
		t.Fatal(err)
	}
	if err := write(nobody(true), path); err != nil {
		t.Fatal(err)
	}
	for at := filepath.Dir(path); filepath.Base(at) != "opt"; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err != nil {
			t.Fatal(err)
		}
		owner := info.Sys().(*syscall.Stat_t).Uid
		if made := filepath.Dir(at) != "/opt"; made != (owner == 65534) {
			t.Errorf("%s is of %d", at, owner)
		}
	}
}

func TestNobodyElseLeadsTheWay(t *testing.T) {
	base := rootsOwn(t)
	secret := filepath.Join(base, "secret")
	for _, one := range []struct {
		name string
		made func(string) error
	}{
		{"others may write", func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, 0o1777)) }},
		{"a group may write", func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, 0o770)) }},
		{"another's", func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chown(path, 65533, 65533)) }},
		{"a link", func(path string) error { return errors.Join(os.Mkdir(secret, 0o700), os.Symlink(secret, path)) }},
	} {
		place := filepath.Join(base, one.name)
		if err := one.made(place); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{filepath.Join(place, "sub", "file"), filepath.Join(place, "file")} {
			if guarded(path) {
				t.Errorf("%s: %s is taken to be root's alone", one.name, path)
			}
		}
	}
	if err := write(nobody(true), filepath.Join(base, "a link", "file")); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
	for _, path := range []string{"/", "", "relative", "/a/../b", "/proc/1/x", "/etc/passwd/x"} {
		if guarded(path) {
			t.Errorf("%q is taken to be root's alone", path)
		}
	}
	if !guarded(filepath.Join(base, "not", "there")) {
		t.Error("what is not there cannot be made")
	}
}
