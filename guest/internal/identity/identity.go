// Package identity is who this VM is: its access token, names, clock, entropy and defaults.
//
// The first introduction sets the token; until then the agent serves nothing else. Every later
// one, after a restore or a fork, must know the token in force and may replace it. What is
// confirmed is read back from the system and never echoed.
package identity

import (
	"cmp"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"sandmartin.dev/guest/internal/content"
	"sandmartin.dev/guest/internal/sockets"
)

// EnvdVersion tells E2B's clients what works.
const EnvdVersion = "0.6.13"

// Where the host names none and the image has it, as E2B's clients expect.
const standardUser = "user"

const (
	maxBody        = 1 << 20
	maxLine        = 4 << 10
	minEntropy     = 32
	clockTolerance = 5 * time.Millisecond
)

// Identity is the state in force. Its methods may be called from any goroutine.
type Identity struct {
	// Recorded only: a developer's machine keeps its own name and clock.
	recordOnly bool
	// One introduction at a time: of two first ones only one can be the first.
	introducing sync.Mutex
	// Bytes of its disk that the root file system is known to fill. A disk never shrinks.
	filled int64

	mu        sync.RWMutex
	token     string
	envs      map[string]string
	user      string
	workdir   string
	sandbox   string
	hostname  string
	machineID string
}

// New returns an identity that waits for its introduction.
func New(recordOnly bool) *Identity {
	return &Identity{recordOnly: recordOnly, envs: map[string]string{}}
}

// Introduced tells whether a token has been set.
func (i *Identity) Introduced() bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.token != ""
}

// Knows compares a token with the one in force.
func (i *Identity) Knows(token string) bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.token != "" && subtle.ConstantTimeCompare([]byte(token), []byte(i.token)) == 1
}

// DefaultUser returns the user that a request without one gets, and whether the host has named it.
func (i *Identity) DefaultUser() (name string, given bool) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return cmp.Or(i.user, standardUser), i.user != ""
}

// WorkdirOf returns where a user's relative paths begin; nothing is its home.
func (i *Identity) WorkdirOf(user string) string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if user != cmp.Or(i.user, standardUser) {
		return ""
	}
	return i.workdir
}

// Envs returns a copy of the sandbox's environment.
func (i *Identity) Envs() map[string]string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return maps.Clone(i.envs)
}

// Signature returns E2B's signature of a file request: v1_ and the unpadded base64 of the
// SHA-256 over path:operation:user:token and, if there is one, :expiry.
func (i *Identity) Signature(path, operation, user, expiry string) string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	text := strings.Join([]string{path, operation, user, i.token}, ":")
	if expiry != "" {
		text += ":" + expiry
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// ServeHTTP answers POST /init. That the caller may use a control route was checked before.
func (i *Identity) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	in := Introduction{received: time.Now(), request: r}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		err = in.decode(body)
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, "the body is not the JSON of an introduction: "+err.Error())
		return
	}
	i.introducing.Lock()
	defer i.introducing.Unlock()
	// The answer to an introduction can get lost; its repetition knows the token it set.
	if i.Introduced() && !i.Knows(r.Header.Get("X-Access-Token")) && !i.Knows(in.AccessToken) {
		refuse(w, http.StatusUnauthorized, "the access token is not the one in force")
		return
	}
	if !i.Introduced() && in.AccessToken == "" {
		refuse(w, http.StatusBadRequest, "the first introduction must set accessToken")
		return
	}
	if err := i.apply(&in); err != nil {
		refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	answer, err := i.answer(&in)
	if err != nil {
		refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(answer)
}

// answer confirms an introduction, with the clock in the form in which the time was told.
func (i *Identity) answer(in *Introduction) ([]byte, error) {
	confirmed, err := i.confirm()
	if err != nil {
		return nil, err
	}
	if now := time.Now(); in.UnixNano != 0 {
		confirmed.UnixNano = now.UnixNano()
	} else {
		confirmed.Time = now.UTC().Format(time.RFC3339Nano)
	}
	return confirmed.encode()
}

// bootID stays the same for as long as the kernel runs.
var bootID = sync.OnceValues(func() (string, error) { return readLine("/proc/sys/kernel/random/boot_id") })

func readLine(path string) (string, error) {
	text, err := content.Read(path, maxLine)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	return strings.TrimSpace(string(text)), nil
}

func connectionOf(r *http.Request) sockets.Connection {
	var c sockets.Connection
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		own := local.AddrPort()
		c.Local = netip.AddrPortFrom(own.Addr().Unmap(), own.Port())
	}
	c.Remote, _ = netip.ParseAddrPort(r.RemoteAddr)
	return c
}

func refuse(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"code": status, "message": message})
}

func (i *Identity) apply(in *Introduction) error {
	if !i.recordOnly {
		// Entropy comes first, so that whatever follows draws from a pool of its own.
		steps := []struct {
			name string
			do   func(*Introduction) error
		}{
			{"entropy", addEntropy}, {"hostname", setHostname}, {"machine-id", setMachineID},
			{"root", i.growRoot}, {"connections", i.leavePlace}, {"clock", setClock},
		}
		for _, step := range steps {
			if err := step.do(in); err != nil {
				return fmt.Errorf("identity: %s: %w", step.name, err)
			}
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if in.AccessToken != "" {
		i.token = in.AccessToken
	}
	if in.EnvVars != nil {
		i.envs = in.EnvVars
	}
	if in.DefaultUser != "" {
		i.user = in.DefaultUser
	}
	if in.DefaultWorkdir != "" {
		i.workdir = in.DefaultWorkdir
	}
	if in.SandboxID != "" {
		i.sandbox = in.SandboxID
	}
	if in.Hostname != "" {
		i.hostname = in.Hostname
	}
	if in.MachineID != "" {
		i.machineID = in.MachineID
	}
	return nil
}

func (i *Identity) confirm() (*Confirmation, error) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	c := &Confirmation{SandboxID: i.sandbox, EnvdVersion: EnvdVersion}
	if i.recordOnly {
		c.Hostname, c.MachineID = i.hostname, i.machineID
		return c, nil
	}
	var err error
	if c.Hostname, err = os.Hostname(); err != nil {
		return nil, err
	}
	if c.MachineID, err = readLine("/etc/machine-id"); err != nil {
		return nil, err
	}
	if c.BootID, err = bootID(); err != nil {
		return nil, err
	}
	return c, nil
}
