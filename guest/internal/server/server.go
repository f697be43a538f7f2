// Package server puts the guest agent together: who may call what, and where it listens.
//
// In a VM there are two listeners. The one on the tap is bound to its device, so nothing inside
// the guest can reach it; only there, and only from the gateway, are control routes accepted.
package server

import (
	"context"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/files"
	"sandmartin.dev/guest/internal/filesystem"
	"sandmartin.dev/guest/internal/gen/filesystem/filesystemconnect"
	"sandmartin.dev/guest/internal/gen/process/processconnect"
	"sandmartin.dev/guest/internal/identity"
	"sandmartin.dev/guest/internal/metrics"
	"sandmartin.dev/guest/internal/process"
	"sandmartin.dev/guest/internal/trees"
	"sandmartin.dev/guest/internal/tunnel"
	"sandmartin.dev/guest/internal/users"
)

const (
	port           = 49983
	tapDevice      = "eth0"
	cgroupRoot     = "/sys/fs/cgroup"
	maxMessage     = 8 << 20
	maxHeader      = 64 << 10
	headerDeadline = 30 * time.Second
	idleDeadline   = 640 * time.Second
	memoryLimit    = 96 << 20
	// Said by the host of requests whose sender may ask for any user.
	raisedHeader = "Sandmartin-Raised"
)

// Main runs the agent with its command line and returns when it can serve no more.
func Main(args []string) error {
	flags := flag.NewFlagSet("agent", flag.ContinueOnError)
	vm := flags.Bool("vm", false, "listen on the tap and on loopback, and take on the identity given")
	address := flags.String("address", "169.254.0.21", "address on the tap")
	gateway := flags.String("gateway", "169.254.0.22", "address control routes are accepted from")
	rehearse := flags.Bool("rehearse", false, "in a VM: before serving do once what will be asked for first")
	listen := flags.String("listen", "127.0.0.1:0", "outside a VM: address and port")
	if err := flags.Parse(args); err != nil {
		return err
	}
	// A guest may make the agent work, but must not make it grow.
	debug.SetMemoryLimit(memoryLimit)
	if !*vm {
		agent := newAgent(identity.New(true), *gateway, "")
		listener, err := net.Listen("tcp", *listen)
		if err != nil {
			return err
		}
		_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"listening": listener.Addr().String()})
		return agent.serve(listener, true)
	}
	if err := process.IgnoreChildren(); err != nil {
		return err
	}
	agent := newAgent(identity.New(false), *gateway, cgroupRoot)
	if *rehearse {
		if err := agent.rehearse(rehearsed, rehearsalLimit); err != nil {
			log.Printf("sandmartin: agent: rehearsal: %v", err)
		}
	}
	return agent.serveVM(*address)
}

func (a *agent) serveVM(address string) error {
	inside, err := listenOn(fmt.Sprintf("127.0.0.1:%d", port), nil)
	if err != nil {
		return err
	}
	tap, err := listenOn(fmt.Sprintf("%s:%d", address, port), func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), tapDevice) }), err)
	})
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() { failed <- a.serve(inside, false) }()
	go func() { failed <- a.serve(tap, true) }()
	return <-failed
}

// listenOn opens a listener of plain TCP connections, without what costs at each: probes (who is idle
// for long is closed, and streams have keepalives of their own) and several paths.
func listenOn(address string, control func(network, address string, raw syscall.RawConn) error) (net.Listener, error) {
	config := net.ListenConfig{Control: control, KeepAlive: -1}
	config.SetMultipathTCP(false)
	return config.Listen(context.Background(), "tcp", address)
}

type agent struct {
	identity  *identity.Identity
	gateway   string
	processes *process.Service
	routes    http.Handler
	refusals  *connect.ErrorWriter
}

func newAgent(who *identity.Identity, gateway, cgroupRoot string) *agent {
	a := &agent{identity: who, gateway: gateway, refusals: connect.NewErrorWriter()}
	a.processes = process.NewService(who, a.userOf, cgroupRoot)
	mux := http.NewServeMux()
	limit := connect.WithReadMaxBytes(maxMessage)
	path, processes := processconnect.NewProcessHandler(a.processes, limit)
	mux.Handle(filesystemconnect.NewFilesystemHandler(filesystem.NewService(a.locate), limit))
	mux.Handle("/files", files.Handler(a.locateNamed, files.UploadIdle))
	mux.Handle("POST /files/compose", files.Composer(a.locateNamed))
	mux.Handle("/tree", trees.Handler(files.UploadIdle))
	mux.HandleFunc("GET /envs", a.tellEnvs)
	mux.Handle("GET /metrics", &metrics.Meter{})
	mux.HandleFunc("POST /sync", func(w http.ResponseWriter, _ *http.Request) {
		unix.Sync()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.Handle("GET /tunnel", tunnel.Handler(gateway))
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		files.Refuse(w, http.StatusNotFound, "there is no such route")
	})
	processes = process.KeepLimit(processes)
	a.routes = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// What is asked for first and most often needs no search among all patterns.
		if strings.HasPrefix(r.URL.Path, path) {
			processes.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
	return a
}

func (a *agent) serve(listener net.Listener, control bool) error {
	return a.server(control).Serve(listener)
}

func (a *agent) server(control bool) *http.Server {
	server := &http.Server{
		Handler:        http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { a.admit(w, r, control) }),
		MaxHeaderBytes: maxHeader,
		IdleTimeout:    idleDeadline,
		ErrorLog:       log.New(os.Stderr, "sandmartin: agent: ", 0),
	}
	if !control {
		// On the tap is the host alone, which is not slow on purpose.
		server.ReadHeaderTimeout = headerDeadline
	}
	return server
}

// admit decides who may go on to the routes.
func (a *agent) admit(w http.ResponseWriter, r *http.Request, control bool) {
	// The host has a clock of its own, and to tell it ours is work at each answer.
	w.Header()["Date"] = nil
	if r.URL.Path == "/init" {
		a.introduce(w, r, control)
		return
	}
	if !a.identity.Introduced() {
		a.refuse(w, r, connect.CodeUnavailable, http.StatusServiceUnavailable, "the sandbox has not been introduced yet")
		return
	}
	if r.URL.Path != "/health" && !a.identity.Knows(r.Header.Get("X-Access-Token")) && !a.signed(w, r) {
		return
	}
	if !control || !a.isHost(r) {
		r.Header.Del(raisedHeader)
	}
	a.routes.ServeHTTP(w, r)
}

func (a *agent) isHost(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	return err == nil && host == a.gateway
}

func (a *agent) introduce(w http.ResponseWriter, r *http.Request, control bool) {
	if !control || !a.isHost(r) {
		files.Refuse(w, http.StatusForbidden, "control routes are for the host alone")
		return
	}
	if r.Method != http.MethodPost {
		files.Refuse(w, http.StatusMethodNotAllowed, "use POST")
		return
	}
	a.identity.ServeHTTP(w, r)
}

// signed tells whether a request without a token carries a valid signature; if not it is refused.
func (a *agent) signed(w http.ResponseWriter, r *http.Request) bool {
	query := r.URL.Query()
	given := query.Get("signature")
	if r.URL.Path != "/files" || given == "" {
		a.refuse(w, r, connect.CodeUnauthenticated, http.StatusUnauthorized, "missing or wrong access token")
		return false
	}
	operation := "read"
	if r.Method == http.MethodPost {
		operation = "write"
	}
	expiry := query.Get("signature_expiration")
	expected := a.identity.Signature(query.Get("path"), operation, query.Get("username"), expiry)
	if subtle.ConstantTimeCompare([]byte(given), []byte(expected)) != 1 {
		files.Refuse(w, http.StatusUnauthorized, "invalid signature")
		return false
	}
	if expiry != "" {
		until, err := strconv.ParseInt(expiry, 10, 64)
		if err != nil || until < time.Now().Unix() {
			files.Refuse(w, http.StatusUnauthorized, "signature is already expired")
			return false
		}
	}
	return true
}

// refuse answers in the form the caller's protocol reads.
func (a *agent) refuse(w http.ResponseWriter, r *http.Request, code connect.Code, status int, message string) {
	if a.refusals.IsSupported(r) {
		_ = a.refusals.Write(w, r, connect.NewError(code, errors.New(message)))
		return
	}
	files.Refuse(w, status, message)
}

func (a *agent) tellEnvs(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a.identity.Envs())
}

// userOf finds the account named by basic authentication, or the default one.
func (a *agent) userOf(header http.Header) (*users.User, error) {
	name, err := nameIn(header)
	if err != nil {
		return nil, err
	}
	return a.named(name, header)
}

// nameIn is the account that the headers name, or nothing.
func nameIn(header http.Header) (string, error) {
	encoded, ok := strings.CutPrefix(header.Get("Authorization"), "Basic ")
	if !ok {
		return "", nil
	}
	decoded, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return "", errors.New("the authorization header is not base64")
	}
	name, _, _ := strings.Cut(string(decoded), ":")
	return name, nil
}

func (a *agent) named(name string, header http.Header) (*users.User, error) {
	user, err := a.account(name)
	if err == nil {
		user.Raised = header.Get(raisedHeader) != ""
	}
	return user, err
}

func (a *agent) account(name string) (*users.User, error) {
	if name != "" {
		return users.Find(name)
	}
	standard, given := a.identity.DefaultUser()
	user, err := users.Find(standard)
	if !given && errors.Is(err, users.ErrUnknown) {
		// An image without the usual account has its root.
		return users.Find("root")
	}
	return user, err
}

func (a *agent) locate(header http.Header, path string) (*users.User, string, error) {
	user, err := a.userOf(header)
	if err != nil {
		return nil, "", err
	}
	return user, a.resolve(user, path), nil
}

func (a *agent) locateNamed(header http.Header, name, path string) (*users.User, string, error) {
	if name == "" {
		var err error
		if name, err = nameIn(header); err != nil {
			return nil, "", err
		}
	}
	user, err := a.named(name, header)
	if err != nil {
		return nil, "", err
	}
	return user, a.resolve(user, path), nil
}

func (a *agent) resolve(user *users.User, path string) string {
	return user.Resolve(path, a.identity.WorkdirOf(user.Name))
}
