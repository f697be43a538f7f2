package server

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"sandmartin.dev/guest/internal/identity"
)

// raisedAsk asks as the host does for a client who may ask for any user, in the name of nobody.
func raisedAsk(t *testing.T, url, kind, body string) int {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.SetBasicAuth("nobody", "")
	for name, value := range map[string]string{"X-Access-Token": token, "Content-Type": kind, raisedHeader: "1"} {
		request.Header.Set(name, value)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	return answer.StatusCode
}

func ownerOf(path string) int {
	info, err := os.Lstat(path)
	if err != nil {
		return -1
	}
	return int(info.Sys().(*syscall.Stat_t).Uid)
}

func TestRightsOfRootAreTheHostsToGive(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	base, err := os.MkdirTemp("/opt", "sandmartin-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	a := newAgent(identity.New(true), "127.0.0.1", "")
	tap, inside := listen(t, a, true), listen(t, a, false)
	if status, answer := ask(t, http.MethodPost, tap+"/init", "", `{"accessToken":"`+token+`"}`); status >= 300 {
		t.Fatal(status, answer)
	}
	if err := errors.Join(os.Chmod(base, 0o755), os.Mkdir(base+"/kept", 0o755), os.WriteFile(base+"/kept/old", []byte("old"), 0o600), os.Symlink("kept/old", base+"/link")); err != nil {
		t.Fatal(err)
	}
	const json, bytes = "application/json", "application/octet-stream"
	file := func(path string) string { return "/files?path=" + base + path }
	call := func(name, fields string) (string, string, string) {
		return "/filesystem.Filesystem/" + name, json, strings.ReplaceAll(fields, "BASE", base)
	}
	type step struct {
		route, kind, body string
		status            int
	}
	var steps []step
	add := func(status int, route, kind, body string) { steps = append(steps, step{route, kind, body, status}) }
	add(200, file("/a/b/new"), bytes, "new")
	add(200, file("/kept/old"), bytes, "over")
	add(403, file("/link"), bytes, "through a link")
	for _, one := range [][2]string{
		{"MakeDir", `{"path":"BASE/made/deep"}`},
		{"Move", `{"source":"BASE/kept/old","destination":"BASE/kept/moved"}`},
		{"Remove", `{"path":"BASE/link"}`},
	} {
		route, kind, body := call(one[0], one[1])
		add(200, route, kind, body)
	}
	add(200, "/files/compose", json, strings.ReplaceAll(`{"source_paths":["BASE/a/b/new"],"destination":"BASE/kept/composed"}`, "BASE", base))
	for _, one := range steps {
		// From inside nobody has more rights for saying so.
		if status := raisedAsk(t, inside+one.route, one.kind, one.body); status != http.StatusForbidden {
			t.Errorf("inside: %s %s: %d", one.route, one.body, status)
		}
		if status := raisedAsk(t, tap+one.route, one.kind, one.body); status != one.status {
			t.Errorf("%s %s: %d", one.route, one.body, status)
		}
	}
	for path, owner := range map[string]int{"/a": 65534, "/a/b": 65534, "/a/b/new": -1, "/made/deep": 65534, "/kept": 0, "/kept/moved": 0, "/kept/composed": 65534, "/link": -1} {
		if got := ownerOf(filepath.Join(base, path)); got != owner {
			t.Errorf("%s is of %d, not %d", path, got, owner)
		}
	}
	if content, _ := os.ReadFile(base + "/kept/moved"); string(content) != "over" {
		t.Errorf("the file has %q", content)
	}
}
