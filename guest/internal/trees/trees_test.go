package trees

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var past = time.Unix(1_000_000_000, 0)

// packed is a whole tar of members. A body of text is the content of a file.
func packed(t *testing.T, members ...any) []byte {
	t.Helper()
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	for n := 0; n < len(members); n++ {
		header := members[n].(tar.Header)
		header.Uid, header.Gid, header.ModTime = max(header.Uid, os.Getuid()), max(header.Gid, os.Getgid()), past
		content := ""
		if n+1 < len(members) {
			if text, ok := members[n+1].(string); ok {
				content = text
				n++
			}
		}
		header.Size = int64(len(content))
		if err := writer.WriteHeader(&header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(writer, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

func file(name string) tar.Header { return tar.Header{Name: name, Mode: 0o644} }
func dir(name string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}
}
func link(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}
}
func hard(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: 0o644}
}

func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// unpacked has a tar unpacked, and returns the members and the error.
func unpacked(content []byte, directory string, owner *owner) (int, error) {
	return unpack(bytes.NewReader(content), directory, owner)
}

func text(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestATreeComesAsItWasAndGoesAsItCame(t *testing.T) {
	asRoot(t)
	base := filepath.Join(t.TempDir(), "made", "for it")
	large := strings.Repeat("0123456789abcdef", 3<<16) + "end"
	suid := file("app/bin/tool")
	suid.Mode, suid.Uid, suid.Gid = 0o4755, 1000, 1001
	closed := dir("app/closed")
	closed.Mode = 0o500
	long := "app/" + strings.Repeat("long/", 40) + "ü"
	members, err := unpacked(packed(t,
		dir("app/"), suid, "#!", file("./app//large"), large, closed, file("app/closed/in"), "x",
		link("app/away", "/etc/passwd"), hard("app/again", "app/large"), file(long), "deep", file("app/empty"),
	), base, nil)
	if err != nil || members != 9 {
		t.Fatal(members, err)
	}
	if text(t, filepath.Join(base, long)) != "deep" || text(t, filepath.Join(base, "app/again")) != large {
		t.Error("the content is not as it was")
	}
	info, _ := os.Lstat(filepath.Join(base, "app/bin/tool"))
	stat := info.Sys().(*syscall.Stat_t)
	if stat.Mode&0o7777 != 0o4755 || stat.Uid != 1000 || stat.Gid != 1001 || !info.ModTime().Equal(past) {
		t.Errorf("%+v", stat)
	}
	for _, name := range []string{"app", "app/closed", "app/away"} {
		if info, err := os.Lstat(filepath.Join(base, name)); err != nil || !info.ModTime().Equal(past) {
			t.Errorf("%s: %v %v", name, info.ModTime(), err)
		}
	}
	if info, _ := os.Stat(filepath.Join(base, "app/bin")); info.Mode().Perm() != implied {
		t.Errorf("what was only implied: %v", info.Mode())
	}

	// And out again, and in elsewhere: the same.
	server := serve(t)
	status, content, outcome := fetch(t, server, filepath.Join(base, "app"))
	if status != http.StatusOK || outcome != whole {
		t.Fatal(status, outcome)
	}
	other := t.TempDir()
	if _, err := unpacked(content, other, nil); err != nil {
		t.Fatal(err)
	}
	if one, two := listed(t, filepath.Join(base, "app")), listed(t, filepath.Join(other, "app")); !reflect.DeepEqual(one, two) {
		t.Errorf("%v\n%v", one, two)
	}
	one, _ := os.Stat(filepath.Join(other, "app/large"))
	two, _ := os.Stat(filepath.Join(other, "app/again"))
	if !os.SameFile(one, two) {
		t.Error("one file has become two")
	}
}

// listed is all that a directory holds.
func listed(t *testing.T, at string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(at, func(path string, entry fs.DirEntry, err error) error {
		info, infoErr := entry.Info()
		if err = errors.Join(err, infoErr); err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		// Of times a tar keeps the seconds.
		line := fmt.Sprint(info.Mode(), info.ModTime().Unix(), stat.Uid, stat.Gid)
		if info.Mode().IsRegular() {
			line += fmt.Sprintf(" %x", sha256.Sum256([]byte(text(t, path))))
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			target, _ := os.Readlink(path)
			line += " " + target
		}
		found[strings.TrimPrefix(path, at)] = line
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestAnOwnerGetsAllOfIt(t *testing.T) {
	asRoot(t)
	base := filepath.Join(t.TempDir(), "new")
	_, err := unpacked(packed(t, file("implied/file"), "x", dir("d"), link("l", "x"), hard("h", "implied/file")), base, &owner{1234, 567})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "implied", "implied/file", "d", "l", "h"} {
		info, err := os.Lstat(filepath.Join(base, name))
		if err != nil {
			t.Fatal(err)
		}
		if stat := info.Sys().(*syscall.Stat_t); stat.Uid != 1234 || stat.Gid != 567 {
			t.Errorf("%s belongs to %d:%d", name, stat.Uid, stat.Gid)
		}
	}
}

func TestWhatIsRefusedIsNamedAndLeavesNothingOutside(t *testing.T) {
	asRoot(t)
	huge := file("x")
	huge.Uid = 1<<32 - 1
	for name, c := range map[string]struct {
		members []any
		says    string
	}{
		"absolute":             {[]any{file("/evil"), "x"}, "'/evil': its name is absolute"},
		"up":                   {[]any{file("a/../../evil"), "x"}, "'a/../../evil': its name leads up"},
		"only up":              {[]any{dir("..")}, "'..': its name leads up"},
		"own link":             {[]any{link("out", "../outside"), file("out/evil"), "x"}, "'out/evil': 'out': it is a link that the tree itself brought"},
		"own link, directory":  {[]any{link("out", "../outside"), dir("out")}, "'out': 'out': it is a link that the tree"},
		"own link, deeper":     {[]any{link("a/out", "/"), file("a/out/tmp/evil"), "x"}, "'a/out/tmp/evil': 'out': it is a link that"},
		"link over a seen way": {[]any{file("seen/x"), "x", link("seen", "../outside")}, "'seen': a directory is there"},
		"file below a file":    {[]any{file("f"), "x", file("f/evil"), "x"}, "'f/evil': 'f': it is there, and is no directory"},
		"hard link up":         {[]any{hard("evil", "../outside/kept")}, "'evil': it is a hard link to '../outside/kept', which is no name in the tree"},
		"hard link, absolute":  {[]any{hard("evil", "/etc/passwd")}, "which is no name in the tree"},
		"hard link by a link":  {[]any{link("out", "../outside"), hard("evil", "out/kept")}, "'evil': hard link to 'out/kept': 'out': it is a link"},
		"hard link to a link":  {[]any{link("l", "../outside/kept"), hard("evil", "l")}, "which is no file"},
		"hard link to nothing": {[]any{hard("evil", "none")}, "hard link to 'none': no such file"},
		"character device":     {[]any{tar.Header{Name: "evil", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}}, "'evil': it is a device or a pipe"},
		"block device":         {[]any{tar.Header{Name: "evil", Typeflag: tar.TypeBlock}}, "'evil': it is a device or a pipe"},
		"pipe":                 {[]any{tar.Header{Name: "evil", Typeflag: tar.TypeFifo}}, "'evil': it is a device or a pipe"},
		"nobody's":             {[]any{huge, "x"}, "its owner 4294967295 is no number"},
		"no name":              {[]any{file("./."), "x"}, "it has no name of its own"},
		"long name":            {[]any{file(strings.Repeat("n", 256)), "x"}, "longer than 255 bytes"},
		"long path":            {[]any{file(strings.Repeat("n/", 2100) + "x"), "x"}, "longer than 4096 bytes"},
		"too deep":             {[]any{file(strings.Repeat("n/", 300) + "x"), "x"}, "more than 255 directories"},
		"empty link":           {[]any{tar.Header{Name: "l", Typeflag: tar.TypeSymlink}}, "leads nowhere"},
	} {
		top := t.TempDir()
		outside, base := filepath.Join(top, "outside"), filepath.Join(top, "base")
		if err := errors.Join(os.Mkdir(outside, 0o755), os.WriteFile(filepath.Join(outside, "kept"), []byte("k"), 0o600)); err != nil {
			t.Fatal(err)
		}
		before := listed(t, outside)
		members, err := unpacked(packed(t, append([]any{file("first"), "1"}, c.members...)...), base, nil)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
		if !reflect.DeepEqual(listed(t, outside), before) {
			t.Errorf("%s: something outside has changed", name)
		}
		if members < 1 || text(t, filepath.Join(base, "first")) != "1" {
			t.Errorf("%s: what came before is gone, %d", name, members)
		}
		if _, err := os.Lstat(filepath.Join(base, "evil")); err == nil {
			t.Errorf("%s: it was made", name)
		}
	}
}

func TestLinksThatWereThereAreFollowedWhereRootAloneMakesThem(t *testing.T) {
	asRoot(t)
	tree := packed(t, dir("lib"), file("lib/x/made"), "x")
	for name, c := range map[string]struct {
		target string
		base   fs.FileMode
		uid    int
		where  string
	}{
		"relative":              {"usr/lib", 0o755, 0, "usr/lib"},
		"up and down":           {"../base/usr/./lib/", 0o755, 0, "usr/lib"},
		"of a link":             {"second", 0o755, 0, "usr/lib"},
		"writable by others":    {"usr/lib", 0o777, 0, ""},
		"writable by the group": {"usr/lib", 0o775, 0, ""},
		"sticky":                {"usr/lib", 0o777 | fs.ModeSticky, 0, ""},
		"another's":             {"usr/lib", 0o755, 1000, ""},
		"another's link":        {"usr/lib", 0o755, 0, ""},
		"circle":                {"lib", 0o755, 0, ""},
		"nowhere":               {"none", 0o755, 0, ""},
		"a file":                {"usr/file", 0o755, 0, ""},
	} {
		base := filepath.Join(t.TempDir(), "base")
		at := func(path string) string { return filepath.Join(base, path) }
		err := errors.Join(
			os.Chmod(filepath.Dir(base), 0o755),
			os.MkdirAll(at("usr/lib"), 0o700), os.WriteFile(at("usr/file"), nil, 0o600),
			os.Symlink("usr/lib", at("second")), os.Symlink(c.target, at("lib")),
			os.Chown(base, c.uid, 0), os.Chmod(base, c.base),
		)
		if name == "another's link" {
			err = errors.Join(err, os.Lchown(at("lib"), 1000, 0))
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = unpacked(tree, base, nil)
		if c.where == "" {
			if err == nil || !strings.Contains(err.Error(), "'lib'") {
				t.Errorf("%s: %v", name, err)
			}
			if found := listed(t, at("usr")); len(found) != 3 {
				t.Errorf("%s: made all the same: %v", name, found)
			}
			continue
		}
		if err != nil || text(t, at(c.where+"/x/made")) != "x" {
			t.Errorf("%s: %v", name, err)
		}
		// What it leads to is nothing that the tree told of.
		if info, _ := os.Stat(at("usr/lib")); info.Mode().Perm() != 0o700 {
			t.Errorf("%s: its directory has changed: %v", name, info.Mode())
		}
	}
}

func TestWhatIsThereIsReplacedOrKept(t *testing.T) {
	asRoot(t)
	base, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	at := func(path string) string { return filepath.Join(base, path) }
	err := errors.Join(
		os.WriteFile(outside, []byte("kept"), 0o600), os.WriteFile(at("file"), []byte("old and long"), 0o600),
		os.Symlink(outside, at("link")), os.Link(outside, at("hard")), syscall.Mkfifo(at("pipe"), 0o600),
		os.Mkdir(at("known"), 0o700), os.WriteFile(at("known/kept"), nil, 0o600), os.Chmod(base, 0o711),
		os.Chown(at("known"), 0, 0),
	)
	if err != nil {
		t.Fatal(err)
	}
	_, err = unpacked(packed(t, dir("."), dir("known"), file("file"), "new", file("link"), "new", file("hard"), "new", file("pipe"), "new",
		link("once", "file"), file("once"), "new", file("twice"), "old", file("twice"), "new"), base, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "link", "hard", "pipe", "once", "twice"} {
		if info, _ := os.Lstat(at(name)); !info.Mode().IsRegular() || text(t, at(name)) != "new" {
			t.Errorf("%s: %v", name, info.Mode())
		}
	}
	if text(t, outside) != "kept" {
		t.Error("it was written by a link")
	}
	if info, _ := os.Stat(base); info.Mode().Perm() != 0o711 {
		t.Errorf("the directory itself was there: %v", info.Mode())
	}
	if info, _ := os.Stat(at("known")); info.Mode().Perm() != 0o755 || !info.ModTime().Equal(past) {
		t.Errorf("a known directory: %v", info.Mode())
	}
	if _, err := unpacked(packed(t, file("known"), "x"), base, nil); err == nil || !strings.Contains(err.Error(), "a directory is there") {
		t.Error(err)
	}
	if _, err := os.Stat(at("known/kept")); err != nil {
		t.Error(err)
	}
}

func TestAnothersDirectoryIsNotGivenAway(t *testing.T) {
	asRoot(t)
	base := t.TempDir()
	secret := filepath.Join(base, "secret")
	if err := errors.Join(os.Mkdir(secret, 0o700), os.Chown(base, 1000, 1000)); err != nil {
		t.Fatal(err)
	}
	// Whoever owns base may have put it there under this name.
	if _, err := unpacked(packed(t, dir("secret"), dir("new")), base, &owner{1000, 1000}); err != nil {
		t.Fatal(err)
	}
	info, _ := os.Stat(secret)
	if stat := info.Sys().(*syscall.Stat_t); stat.Uid != 0 || info.Mode().Perm() != 0o700 {
		t.Errorf("%+v", stat)
	}
	// Nor in a place where everybody may make one.
	if err := errors.Join(os.Chown(base, 0, 0), os.Chmod(base, 0o777|fs.ModeSticky), os.Chown(secret, 1001, 1001)); err != nil {
		t.Fatal(err)
	}
	if _, err := unpacked(packed(t, dir("secret")), base, nil); err != nil {
		t.Fatal(err)
	}
	info, _ = os.Stat(secret)
	if stat := info.Sys().(*syscall.Stat_t); stat.Uid != 1001 || info.Mode().Perm() != 0o700 {
		t.Errorf("%+v", stat)
	}
	info, _ = os.Stat(filepath.Join(base, "new"))
	if stat := info.Sys().(*syscall.Stat_t); stat.Uid != 1000 || info.Mode().Perm() != 0o755 {
		t.Errorf("%+v", stat)
	}
	// What lies where others may replace it gets no name where they may not.
	top := t.TempDir()
	_, err := unpacked(packed(t, dir("safe"), tar.Header{Name: "theirs", Typeflag: tar.TypeDir, Mode: 0o755, Uid: 1000}, file("theirs/x"), "x", hard("safe/x", "theirs/x")), top, nil)
	if err == nil || !strings.Contains(err.Error(), "in whose place others than root may put another") {
		t.Error(err)
	}
}

func TestATarThatIsCutIsNotTakenForAWholeOne(t *testing.T) {
	content := packed(t, file("one"), "1", file("two"), strings.Repeat("2", 3000), file("three"), "3")
	end := bytes.LastIndex(content, []byte("three"))
	for cut, expected := range map[int]int{0: 0, 100: 0, 512: 0, 1024: 1, 1536: 1, 2000: 1, end: 2, end + 1024: 3, end + 1536: 3} {
		base := filepath.Join(t.TempDir(), "base")
		members, err := unpacked(content[:cut], base, nil)
		if err == nil || !strings.Contains(err.Error(), "cut off") || members != expected {
			t.Errorf("%d: %d members, %v", cut, members, err)
		}
		if found, _ := os.ReadDir(base); len(found) != expected {
			t.Errorf("%d: left %v", cut, found)
		}
	}
	base := t.TempDir()
	if _, err := unpacked([]byte(strings.Repeat("no tar ", 1000)), base, nil); !errors.Is(err, tar.ErrHeader) {
		t.Error(err)
	}
	// Some writers fill up to their own block size.
	if members, err := unpacked(append(content, make([]byte, 20480)...), base, nil); members != 3 || err != nil {
		t.Error(members, err)
	}
}

func TestWhatCannotBeGivenIsLeftOutOrTold(t *testing.T) {
	asRoot(t)
	top := filepath.Join(t.TempDir(), "top")
	at := func(path string) string { return filepath.Join(top, path) }
	err := errors.Join(
		os.MkdirAll(at("mounted/in"), 0o755), syscall.Mkfifo(at("pipe"), 0o600),
		syscall.Mknod(at("device"), syscall.S_IFCHR, 1<<8|3), os.WriteFile(at("file"), []byte("x"), 0o600),
		syscall.Mount("none", at("mounted"), "tmpfs", 0, ""), os.WriteFile(at("mounted/other"), nil, 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(at("mounted"), 0) })
	base := serve(t)
	status, content, outcome := fetch(t, base, top)
	if status != http.StatusOK || outcome != whole {
		t.Fatal(status, outcome)
	}
	var names []string
	for reader := tar.NewReader(bytes.NewReader(content)); ; {
		header, err := reader.Next()
		if err != nil {
			break
		}
		names = append(names, header.Name)
	}
	slices.Sort(names)
	if expected := []string{"top/", "top/file", "top/mounted/"}; !slices.Equal(names, expected) {
		t.Errorf("%v", names)
	}
	// What is asked for by its own name is, wherever it is.
	if _, content, _ = fetch(t, base, at("mounted")); !bytes.Contains(content, []byte("mounted/other")) {
		t.Error("a mounted directory has nothing in it")
	}
	for path, expected := range map[string]int{at("none"): 404, at("file/below"): 400, at("pipe"): 400, "": 400, "relative": 400} {
		if status, _, _ := fetch(t, base, path); status != expected {
			t.Errorf("%s: %d", path, status)
		}
	}
}

func TestTheRootIsATreeToo(t *testing.T) {
	source, err := find("/")
	if err != nil {
		t.Fatal(err)
	}
	defer source.close()
	if source.entry != "." || source.name != "." {
		t.Error(source)
	}
}

func serve(t *testing.T) string {
	t.Helper()
	server := httptest.NewServer(Handler(time.Minute))
	t.Cleanup(server.Close)
	return server.URL + "/tree?path="
}

func fetch(t *testing.T, base, path string) (int, []byte, string) {
	t.Helper()
	answer, err := http.Get(base + url.QueryEscape(path))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, content, answer.Trailer.Get(outcomeTrailer)
}
