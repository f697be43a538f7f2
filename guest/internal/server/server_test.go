package server

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sandmartin.dev/guest/internal/identity"
)

const token = "the token"

// listen serves an agent on loopback, as the tap does (control) or the inside.
func listen(t *testing.T, a *agent, control bool) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() { _ = a.serve(listener, control) }()
	return "http://" + listener.Addr().String()
}

func ask(t *testing.T, method, url, token, body string) (int, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("X-Access-Token", token)
	if strings.Contains(url, ".") && method == http.MethodPost {
		request.Header.Set("Content-Type", "application/json")
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(content)
}

var everyRoute = []string{"/health", "/metrics", "/sync", "/files?path=/etc/passwd", "/process.Process/List", "/filesystem.Filesystem/Stat", "/tunnel?port=22", "/no/such"}

func TestNothingIsServedBeforeTheIntroduction(t *testing.T) {
	a := newAgent(identity.New(true), "127.0.0.1", "")
	for _, control := range []bool{true, false} {
		base := listen(t, a, control)
		for _, route := range everyRoute {
			for _, method := range []string{http.MethodGet, http.MethodPost} {
				if status, body := ask(t, method, base+route, "", "{}"); status != http.StatusServiceUnavailable {
					t.Errorf("%s %s: %d %s", method, route, status, body)
				}
			}
		}
	}
}

func TestARehearsalLeavesNothing(t *testing.T) {
	mark := strconv.Itoa(os.Getpid()) + ".25"
	script := filepath.Join(t.TempDir(), "endless")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nsleep "+mark+" &\nexec sleep "+mark+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := newAgent(identity.New(true), "127.0.0.1", "")
	for _, command := range []string{rehearsed, "/no/such/command", script} {
		begun := time.Now()
		if err := a.rehearse(command, 300*time.Millisecond); err != nil {
			t.Errorf("%s: %v", command, err)
		}
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("%s took %v", command, took)
		}
	}
	if status, body := ask(t, http.MethodGet, listen(t, a, true)+"/health", rehearsalToken, ""); status != http.StatusServiceUnavailable {
		t.Errorf("%d %s", status, body)
	}
	for until := time.Now().Add(10 * time.Second); running("sleep\x00" + mark); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("what the rehearsal started still runs")
		}
	}
}

// running tells whether any process has such a command line.
func running(command string) bool {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	return slices.ContainsFunc(found, func(path string) bool {
		content, _ := os.ReadFile(path)
		return strings.HasPrefix(string(content), command)
	})
}

func TestOnlyTheGatewayMayIntroduceAndOnlyOnTheTap(t *testing.T) {
	body := `{"accessToken":"` + token + `"}`
	for _, c := range []struct {
		name, gateway string
		control       bool
		status        int
	}{
		{"the gateway on the tap", "127.0.0.1", true, 200},
		{"another address on the tap", "127.0.0.2", true, 403},
		{"from inside", "127.0.0.1", false, 403},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newAgent(identity.New(true), c.gateway, "")
			base := listen(t, a, c.control)
			if status, _ := ask(t, http.MethodGet, base+"/init", "", ""); status == http.StatusOK {
				t.Error("GET introduces")
			}
			status, answer := ask(t, http.MethodPost, base+"/init", "", body)
			if status != c.status || a.identity.Introduced() != (c.status == http.StatusOK) {
				t.Errorf("%d %s", status, answer)
			}
		})
	}
}

func introduced(t *testing.T, control bool) string {
	t.Helper()
	a := newAgent(identity.New(true), "127.0.0.1", "")
	if status, answer := ask(t, http.MethodPost, listen(t, a, true)+"/init", "", `{"accessToken":"`+token+`"}`); status != http.StatusOK {
		t.Fatal(answer)
	}
	return listen(t, a, control)
}

func TestEveryRouteButHealthNeedsTheToken(t *testing.T) {
	base := introduced(t, false)
	for _, route := range everyRoute[1:] {
		for _, given := range []string{"", "the toke", "the token "[:9] + "x"} {
			if status, body := ask(t, http.MethodPost, base+route, given, "{}"); status != http.StatusUnauthorized || strings.Contains(body, token) {
				t.Errorf("%s with %q: %d %s", route, given, status, body)
			}
		}
	}
	for route, expected := range map[string]int{"/health": 204, "/metrics": 200, "/no/such": 404} {
		if status, _ := ask(t, http.MethodGet, base+route, token, ""); status != expected {
			t.Errorf("%s: %d", route, status)
		}
	}
	if status, _ := ask(t, http.MethodGet, base+"/health", "", ""); status != http.StatusNoContent {
		t.Errorf("/health without a token: %d", status)
	}
	var refusal struct{ Code string }
	_, body := ask(t, http.MethodPost, base+"/process.Process/List", "", "{}")
	if err := json.Unmarshal([]byte(body), &refusal); err != nil || refusal.Code != "unauthenticated" {
		t.Errorf("a Connect client is refused by %s", body)
	}
}

func TestSignaturesOpenOneFileForOneUse(t *testing.T) {
	who := identity.New(true)
	a := newAgent(who, "127.0.0.1", "")
	base := listen(t, a, true)
	ask(t, http.MethodPost, base+"/init", "", `{"accessToken":"`+token+`"}`)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	soon, past := strconv.FormatInt(time.Now().Unix()+60, 10), strconv.FormatInt(time.Now().Unix()-60, 10)
	me := strconv.Itoa(os.Getuid())
	for _, c := range []struct {
		name, method, path, operation, expiry, sent string
		status                                      int
	}{
		{"read", "GET", path, "read", "", "", 200},
		{"read in time", "GET", path, "read", soon, soon, 200},
		{"read too late", "GET", path, "read", past, past, 401},
		{"another expiry than the signed one", "GET", path, "read", past, soon, 401},
		{"no expiry where one was signed", "GET", path, "read", soon, "", 401},
		{"an expiry that is none", "GET", path, "read", "never", "never", 401},
		{"another path", "GET", "/etc/hosts", "read", "", "", 401},
		{"read by a signature to write", "GET", path, "write", "", "", 401},
		{"write by a signature to read", "POST", path, "read", "", "", 401},
		{"write", "POST", path, "write", "", "", 200},
	} {
		query := url.Values{"path": {path}, "username": {me}, "signature": {who.Signature(c.path, c.operation, me, c.expiry)}}
		if c.sent != "" {
			query.Set("signature_expiration", c.sent)
		}
		if status, body := ask(t, c.method, base+"/files?"+query.Encode(), "", "content"); status != c.status {
			t.Errorf("%s: %d %s", c.name, status, body)
		}
	}
	query := url.Values{"signature": {who.Signature("", "read", "", "")}}
	if status, _ := ask(t, http.MethodGet, base+"/metrics?"+query.Encode(), "", ""); status != http.StatusUnauthorized {
		t.Errorf("a signature opens /metrics: %d", status)
	}
}
