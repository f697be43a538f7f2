// Package process serves process.Process: starting processes, listening to them, feeding and
// signalling them.
//
// A client that goes away never ends a process; its time limit does. A process number is
// signalled only while it is certain to be this process: the zombie is kept until then.
package process

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
	"unsafe"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processpb "sandmartin.dev/guest/internal/gen/process"
	"sandmartin.dev/guest/internal/gen/process/processconnect"
	"sandmartin.dev/guest/internal/identity"
	"sandmartin.dev/guest/internal/keepalive"
	"sandmartin.dev/guest/internal/users"
)

const (
	timeoutHeader = "Connect-Timeout-Ms"
	// Digits of a time limit in milliseconds, as the Connect protocol bounds them.
	maxTimeoutDigits = 10
)

// UserOf finds the account a request asks for.
type UserOf func(http.Header) (*users.User, error)

// Service is the table of processes.
type Service struct {
	processconnect.UnimplementedProcessHandler
	identity *identity.Identity
	userOf   UserOf
	groups   cgroups

	mu    sync.Mutex
	table map[int]*Process
}

// NewService returns an empty table. Processes get control groups below cgroupRoot; empty is none.
func NewService(identity *identity.Identity, userOf UserOf, cgroupRoot string) *Service {
	return &Service{identity: identity, userOf: userOf, groups: cgroups{root: cgroupRoot}, table: map[int]*Process{}}
}

// Prepare makes ahead what the process that is started first needs.
func (s *Service) Prepare() {
	s.groups.prepare()
	_, _ = nullDevice()
}

// IgnoreChildren has the kernel tell this program nothing of its children's ends, of which Go's
// handler makes nothing either: their ends are waited for. To be called before anything is started.
func IgnoreChildren() error {
	// struct sigaction of the kernel: handler, flags, restorer, mask; all zero is SIG_DFL.
	var standard [4]uintptr
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGCHLD), uintptr(unsafe.Pointer(&standard)), 0, unsafe.Sizeof(standard[3]), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

type limitKey struct{}

// KeepLimit moves the deadline of a request from the call to the process: the call must still be
// there to tell that the process was ended.
func KeepLimit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == processconnect.ProcessStartProcedure {
			given := r.Header.Get(timeoutHeader)
			ms, err := strconv.ParseInt(given, 10, 64)
			if err == nil && ms > 0 && len(given) <= maxTimeoutDigits {
				limit := time.Duration(ms) * time.Millisecond
				r = r.WithContext(context.WithValue(r.Context(), limitKey{}, limit))
			}
			r.Header.Del(timeoutHeader)
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Service) add(p *Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table[p.pid] = p
}

func (s *Service) remove(p *Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table[p.pid] == p {
		delete(s.table, p.pid)
	}
}

func (s *Service) find(selector *processpb.ProcessSelector) (*Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if selector.GetTag() == "" {
		if p, ok := s.table[int(selector.GetPid())]; ok {
			return p, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", selector.GetPid()))
	}
	var found *Process
	for _, p := range s.table {
		// A tag may be used again; what still runs is meant.
		if p.tag != nil && *p.tag == selector.GetTag() && (found == nil || p.running()) {
			found = p
		}
	}
	if found != nil {
		return found, nil
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with tag %s not found", selector.GetTag()))
}

// List returns the processes that run.
func (s *Service) List(context.Context, *connect.Request[processpb.ListRequest]) (*connect.Response[processpb.ListResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := &processpb.ListResponse{}
	for _, p := range s.table {
		if p.running() {
			list.Processes = append(list.Processes, &processpb.ProcessInfo{Config: p.config, Pid: uint32(p.pid), Tag: p.tag})
		}
	}
	return connect.NewResponse(list), nil
}

// Start runs a process and streams its events until its end.
func (s *Service) Start(ctx context.Context, request *connect.Request[processpb.StartRequest], stream *connect.ServerStream[processpb.StartResponse]) error {
	user, err := s.userOf(request.Header())
	if err != nil {
		return connect.NewError(connect.CodeUnauthenticated, err)
	}
	if err := validate(request.Msg.GetProcess()); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	limit, _ := ctx.Value(limitKey{}).(time.Duration)
	p, listener, err := s.begin(user, request.Msg, limit)
	if err != nil {
		return err
	}
	return p.relay(ctx, listener, keepalive.Interval(request.Header()), func(event *processpb.ProcessEvent) error {
		return stream.Send(&processpb.StartResponse{Event: event})
	})
}

// Connect listens to a process that was started before.
func (s *Service) Connect(ctx context.Context, request *connect.Request[processpb.ConnectRequest], stream *connect.ServerStream[processpb.ConnectResponse]) error {
	p, err := s.find(request.Msg.GetProcess())
	if err != nil {
		return err
	}
	return p.relay(ctx, p.subscribe(), keepalive.Interval(request.Header()), func(event *processpb.ProcessEvent) error {
		return stream.Send(&processpb.ConnectResponse{Event: event})
	})
}

// relay sends events until the end of the process or of the client.
func (p *Process) relay(ctx context.Context, from *subscriber, quiet time.Duration, send func(*processpb.ProcessEvent) error) error {
	defer p.unsubscribe(from)
	// A send that waits for a slow client does not notice that the client has gone; this does.
	stop := context.AfterFunc(ctx, func() { p.unsubscribe(from) })
	defer stop()
	ticker := time.NewTicker(quiet)
	defer ticker.Stop()
	for {
		event := &processpb.ProcessEvent{Event: &processpb.ProcessEvent_Keepalive{Keepalive: &processpb.ProcessEvent_KeepAlive{}}}
		select {
		case <-from.wake:
			if event = p.take(from); event == nil {
				continue
			}
			ticker.Reset(quiet)
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := send(event); err != nil {
			return err
		}
		p.sent(from)
		if event.GetEnd() != nil {
			return nil
		}
	}
}

// Update resizes the terminal of a process.
func (s *Service) Update(_ context.Context, request *connect.Request[processpb.UpdateRequest]) (*connect.Response[processpb.UpdateResponse], error) {
	p, err := s.find(request.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if size := request.Msg.GetPty(); size != nil {
		if p.pty == nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has no terminal"))
		}
		if err := resize(p.pty, size.GetSize()); err != nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the terminal is closed: %w", err))
		}
	}
	return connect.NewResponse(&processpb.UpdateResponse{}), nil
}

// SendInput writes to the standard input or the terminal of a process.
func (s *Service) SendInput(ctx context.Context, request *connect.Request[processpb.SendInputRequest]) (*connect.Response[processpb.SendInputResponse], error) {
	p, err := s.find(request.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.give(ctx, request.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.SendInputResponse{}), nil
}

func (p *Process) give(ctx context.Context, input *processpb.ProcessInput) error {
	data := input.GetStdin()
	if _, terminal := input.GetInput().(*processpb.ProcessInput_Pty); terminal {
		data = input.GetPty()
	}
	err := p.write(ctx, data)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, errStdinClosed), errors.Is(err, os.ErrClosed), errors.Is(err, unix.EPIPE), errors.Is(err, unix.EIO):
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the process takes no input: %w", err))
	}
	return connect.NewError(connect.CodeInternal, err)
}

// StreamInput writes a stream of input; its first message names the process.
func (s *Service) StreamInput(ctx context.Context, stream *connect.ClientStream[processpb.StreamInputRequest]) (*connect.Response[processpb.StreamInputResponse], error) {
	var p *Process
	for stream.Receive() {
		switch event := stream.Msg().GetEvent().(type) {
		case *processpb.StreamInputRequest_Start:
			found, err := s.find(event.Start.GetProcess())
			if err != nil {
				return nil, err
			}
			p = found
		case *processpb.StreamInputRequest_Data:
			if p == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the first message must name the process"))
			}
			if err := p.give(ctx, event.Data.GetInput()); err != nil {
				return nil, err
			}
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.StreamInputResponse{}), nil
}

// SendSignal signals a process; SIGKILL ends all that it started too.
func (s *Service) SendSignal(_ context.Context, request *connect.Request[processpb.SendSignalRequest]) (*connect.Response[processpb.SendSignalResponse], error) {
	p, err := s.find(request.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	number := unix.Signal(request.Msg.GetSignal())
	if number < 1 || number > 64 {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("signal %d does not exist", number))
	}
	if err := p.signal(number); err != nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process %d has ended: %w", p.pid, err))
	}
	return connect.NewResponse(&processpb.SendSignalResponse{}), nil
}

// CloseStdin lets the process read the end of its input, after all that was written before.
func (s *Service) CloseStdin(ctx context.Context, request *connect.Request[processpb.CloseStdinRequest]) (*connect.Response[processpb.CloseStdinResponse], error) {
	p, err := s.find(request.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if p.pty != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("a terminal is closed by its own end-of-input character"))
	}
	if err := p.closeInput(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.CloseStdinResponse{}), nil
}
