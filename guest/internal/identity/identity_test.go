package identity

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/content"
)

func introduce(i *Identity, token, body string) *httptest.ResponseRecorder {
	request := httptest.NewRequest(http.MethodPost, "/init", strings.NewReader(body))
	request.Header.Set("X-Access-Token", token)
	answer := httptest.NewRecorder()
	i.ServeHTTP(answer, request)
	return answer
}

func TestIntroductionsInTurn(t *testing.T) {
	i := New(true)
	for _, step := range []struct {
		name, token, body string
		status            int
		inForce           string
	}{
		{"no JSON", "", `{"accessToken"`, 400, ""},
		{"not a string", "", `{"accessToken":7}`, 400, ""},
		{"larger than allowed", "", `{"hostname":"` + strings.Repeat("x", maxBody) + `"}`, 400, ""},
		{"the first without a token", "", `{"sandboxId":"sb1"}`, 400, ""},
		{"the first", "", `{"accessToken":"one","sandboxId":"sb1","envVars":{"A":"1"}}`, 200, "one"},
		{"a stranger", "", `{"sandboxId":"sb2"}`, 401, "one"},
		{"a stranger with a token of its own", "two", `{"accessToken":"two"}`, 401, "one"},
		{"a change of names", "one", `{"sandboxId":"sb2","hostname":"h"}`, 200, "one"},
		{"a new token", "one", `{"accessToken":"three"}`, 200, "three"},
		{"the same again, its answer was lost", "one", `{"accessToken":"three"}`, 200, "three"},
		{"the parent's token", "one", `{"sandboxId":"sb3"}`, 401, "three"},
	} {
		if answer := introduce(i, step.token, step.body); answer.Code != step.status {
			t.Errorf("%s: %d, not %d: %s", step.name, answer.Code, step.status, answer.Body)
		}
		if i.Introduced() != (step.inForce != "") || i.Knows("") {
			t.Errorf("%s: introduced is %v", step.name, i.Introduced())
		}
		if step.inForce != "" && !i.Knows(step.inForce) {
			t.Errorf("%s: %s is not in force", step.name, step.inForce)
		}
	}
	confirmed := introduce(i, "three", `{}`).Body.String()
	for _, kept := range []string{`"sandboxId":"sb2"`, `"hostname":"h"`} {
		if !strings.Contains(confirmed, kept) {
			t.Errorf("%s is missing in %s: an empty field must change nothing", kept, confirmed)
		}
	}
	if i.Envs()["A"] != "1" || strings.Contains(confirmed, "three") {
		t.Errorf("the environment is %v, the answer %s", i.Envs(), confirmed)
	}
}

func TestAnEmptyEnvironmentReplacesOneAndNullDoesNot(t *testing.T) {
	i := New(true)
	for _, step := range []struct {
		given    string
		expected int
	}{{`{"A":"1","B":"2"}`, 2}, {`null`, 2}, {`{"C":"3"}`, 1}, {`{}`, 0}} {
		introduce(i, "one", `{"accessToken":"one","envVars":`+step.given+`}`)
		if len(i.Envs()) != step.expected {
			t.Errorf("after %s it is %v", step.given, i.Envs())
		}
	}
}

func TestOfManyFirstIntroductionsOneWins(t *testing.T) {
	i := New(true)
	var wait sync.WaitGroup
	var mu sync.Mutex
	var won []string
	for n := range 32 {
		wait.Go(func() {
			token := fmt.Sprint("token-", n)
			if introduce(i, "", `{"accessToken":"`+token+`"}`).Code == http.StatusOK {
				mu.Lock()
				won = append(won, token)
				mu.Unlock()
			}
		})
	}
	wait.Wait()
	if len(won) != 1 || !i.Knows(won[0]) {
		t.Errorf("%v think that they were first", won)
	}
}

func TestSignature(t *testing.T) {
	i := New(true)
	introduce(i, "", `{"accessToken":"secret"}`)
	// printf '/a b:read:user:secret:1700000000' | openssl dgst -sha256 -binary | base64
	const expected = "v1_yyt/btPnjNeYvsGotvgpiieOmJz+H+BhV/1dCBkjMPI"
	if got := i.Signature("/a b", "read", "user", "1700000000"); got != expected {
		t.Errorf("got %s", got)
	}
	// printf '/a b:write::secret' | ...
	const unbounded = "v1_z3kqIJvEG/Od0sIkiA+1gNxcPg/geF3+ke2Vx/jsC5c"
	if got := i.Signature("/a b", "write", "", ""); got != unbounded {
		t.Errorf("got %s", got)
	}
}

func TestTheHostLineIsReplaced(t *testing.T) {
	for _, c := range []struct{ before, after string }{
		{"", "127.0.0.1\tlocalhost\n127.0.1.1\tnew\n"},
		{"127.0.0.1 localhost\n127.0.1.1 old older\n::1 ip6\n", "127.0.0.1 localhost\n::1 ip6\n127.0.1.1\tnew\n"},
		{"127.0.0.1 localhost\n# 127.0.1.1 old", "127.0.0.1 localhost\n# 127.0.1.1 old\n127.0.1.1\tnew\n"},
	} {
		got := replaceHostLine(c.before, "new")
		if got != c.after || replaceHostLine(got, "new") != got {
			t.Errorf("%q becomes %q", c.before, got)
		}
	}
}

func TestEntropyMustBeEnough(t *testing.T) {
	for _, given := range []string{"AAAA", "no base64!", strings.Repeat("A", 40)} {
		if err := addEntropy(&Introduction{Entropy: given}); err == nil {
			t.Errorf("%q was taken", given)
		}
	}
}

func TestAFullDiskStillTakesAnotherIdentity(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	disk := t.TempDir()
	if err := unix.Mount("none", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, 0) })
	path := filepath.Join(disk, "machine-id")
	if err := content.Replace(path, "0123456789\n", 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(disk, "fill"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	for _, text := range []string{"9876543210\n", "short\n", "9876543210\n"} {
		if err := content.Replace(path, text, 0o444); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(path); string(got) != text {
			t.Errorf("got %q", got)
		}
	}
}
