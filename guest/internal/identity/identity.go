// Package identity is who this VM is: its access token, names, clock, entropy and defaults.
//
// The first introduction sets the token; until then the agent serves nothing else. Every later
// one, after a restore or a fork, must know the token in force and may replace it. What is
// confirmed is read back from the system and never echoed.
package identity

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// EnvdVersion tells E2B's clients what works. Directory watching (0.1.4) does not yet, so no
// later gate may be claimed either.
const EnvdVersion = "0.1.3"

const (
	maxBody        = 1 << 20
	minEntropy     = 32
	clockTolerance = 5 * time.Millisecond
	ext4ResizeFS   = 0x40086610 // EXT4_IOC_RESIZE_FS, fs/ext4/ext4.h: _IOW('f', 16, __u64)
)

// Introduction is what the host says in POST /init. Empty fields change nothing.
type Introduction struct {
	AccessToken    string            `json:"accessToken"`
	EnvVars        map[string]string `json:"envVars"`
	Timestamp      string            `json:"timestamp"` // RFC 3339 with nanoseconds
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir string            `json:"defaultWorkdir"`
	Hostname       string            `json:"hostname"`
	MachineID      string            `json:"machineId"` // 32 hex digits
	SandboxID      string            `json:"sandboxId"`
	TemplateID     string            `json:"templateId"`
	Entropy        string            `json:"entropy"` // base64
	// GrowRoot lets the root file system fill its disk.
	GrowRoot bool `json:"growRoot"`

	received time.Time
}

// Confirmation is the answer: what is in force now.
type Confirmation struct {
	SandboxID   string `json:"sandboxId"`
	Hostname    string `json:"hostname"`
	MachineID   string `json:"machineId"`
	BootID      string `json:"bootId"`
	Timestamp   string `json:"timestamp"`
	EnvdVersion string `json:"envdVersion"`
}

// Identity is the state in force. Its methods may be called from any goroutine.
type Identity struct {
	// Recorded only: a developer's machine keeps its own name and clock.
	recordOnly bool
	// One introduction at a time: of two first ones only one can be the first.
	introducing sync.Mutex

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
	return &Identity{recordOnly: recordOnly, user: "user", envs: map[string]string{}}
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

// Defaults returns the user and the working directory that a request without them gets.
func (i *Identity) Defaults() (user, workdir string) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.user, i.workdir
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
	in := Introduction{received: time.Now()}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&in); err != nil {
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
	confirmed, err := i.confirm()
	if err != nil {
		refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(confirmed)
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
		}{{"entropy", addEntropy}, {"hostname", setHostname}, {"machine-id", setMachineID}, {"root", growRoot}, {"clock", setClock}}
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
	c := &Confirmation{SandboxID: i.sandbox, EnvdVersion: EnvdVersion, Timestamp: time.Now().UTC().Format(time.RFC3339Nano)}
	if i.recordOnly {
		c.Hostname, c.MachineID = i.hostname, i.machineID
		return c, nil
	}
	var err error
	if c.Hostname, err = os.Hostname(); err != nil {
		return nil, err
	}
	for path, field := range map[string]*string{"/etc/machine-id": &c.MachineID, "/proc/sys/kernel/random/boot_id": &c.BootID} {
		content, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		*field = strings.TrimSpace(string(content))
	}
	return c, nil
}

// addEntropy credits the host's random bytes to the kernel and has its generator reseeded
// (random(4)): two forks of one parent must not draw the same numbers.
func addEntropy(in *Introduction) error {
	if in.Entropy == "" {
		return nil
	}
	bytes, err := base64.StdEncoding.DecodeString(in.Entropy)
	if err != nil {
		return err
	}
	if len(bytes) < minEntropy {
		return fmt.Errorf("%d bytes are too few", len(bytes))
	}
	bytes = bytes[:len(bytes)&^3]
	pool := make([]int32, 2+len(bytes)/4)
	pool[0], pool[1] = int32(len(bytes)*8), int32(len(bytes))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&pool[2])), len(bytes)), bytes)
	device, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool[0]))); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

func setHostname(in *Introduction) error {
	if in.Hostname == "" {
		return nil
	}
	if err := unix.Sethostname([]byte(in.Hostname)); err != nil {
		return err
	}
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	if err := replaceContent("/etc/hostname", in.Hostname+"\n", 0o644); err != nil {
		return err
	}
	hosts := "127.0.0.1\tlocalhost\n127.0.1.1\t" + in.Hostname + "\n"
	current, err := os.ReadFile("/etc/hosts")
	if err == nil {
		hosts = replaceHostLine(string(current), in.Hostname)
	}
	return replaceContent("/etc/hosts", hosts, 0o644)
}

// replaceContent changes a small file in place: a sandbox whose disk is full can still be told who
// it is, because blocks in use are not given up first.
func replaceContent(path, content string, mode os.FileMode) error {
	if current, err := os.ReadFile(path); err == nil && string(current) == content {
		return nil
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, mode)
	if err != nil {
		return err
	}
	_, err = file.WriteString(content)
	if err == nil {
		err = file.Truncate(int64(len(content)))
	}
	return errors.Join(err, file.Close())
}

// replaceHostLine points 127.0.1.1, where Debian keeps it, at the host's own name.
func replaceHostLine(content, hostname string) string {
	var kept []string
	for line := range strings.Lines(content) {
		if fields := strings.Fields(line); len(fields) == 0 || fields[0] != "127.0.1.1" {
			kept = append(kept, strings.TrimRight(line, "\n"))
		}
	}
	if !strings.Contains(content, "localhost") {
		kept = append(kept, "127.0.0.1\tlocalhost")
	}
	return strings.Join(append(kept, "127.0.1.1\t"+hostname), "\n") + "\n"
}

func setMachineID(in *Introduction) error {
	if in.MachineID == "" {
		return nil
	}
	if err := replaceContent("/etc/machine-id", in.MachineID+"\n", 0o444); err != nil {
		return err
	}
	const dbus = "/var/lib/dbus/machine-id"
	if info, err := os.Lstat(dbus); err == nil && info.Mode().IsRegular() {
		return replaceContent(dbus, in.MachineID+"\n", 0o444)
	}
	return nil
}

func setClock(in *Introduction) error {
	if in.Timestamp == "" {
		return nil
	}
	now, err := time.Parse(time.RFC3339Nano, in.Timestamp)
	if err != nil {
		return err
	}
	// The steps before this one took their time.
	now = now.Add(time.Since(in.received))
	if time.Since(now).Abs() < clockTolerance {
		return nil
	}
	spec := unix.NsecToTimespec(now.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &spec)
}

// growRoot lets an ext4 root fill its disk while mounted; other file systems are left alone.
func growRoot(in *Introduction) error {
	if !in.GrowRoot {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err != nil {
		return err
	}
	var stat unix.Stat_t
	if err := unix.Stat("/", &stat); err != nil {
		return err
	}
	if fs.Type != unix.EXT4_SUPER_MAGIC {
		return nil
	}
	device := fmt.Sprintf("/sys/dev/block/%d:%d/size", unix.Major(stat.Dev), unix.Minor(stat.Dev))
	content, err := os.ReadFile(device)
	if err != nil {
		return err
	}
	var sectors uint64
	if _, err := fmt.Sscan(string(content), &sectors); err != nil {
		return err
	}
	blocks := sectors * 512 / uint64(fs.Bsize)
	// Blocks in use by the file system's own tables do not count in f_blocks; only a disk that is
	// larger by more than those can be meant.
	if blocks <= fs.Blocks+fs.Blocks/16 {
		return nil
	}
	root, err := os.Open("/")
	if err != nil {
		return err
	}
	defer root.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return errno
	}
	return nil
}
