package process

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	processpb "sandmartin.dev/guest/internal/gen/process"
)

const (
	chunkSize    = 32 << 10
	ptyChunkSize = 16 << 10
	// A subscriber that reads slowly holds this many chunks; after that the process waits.
	queueLength = 8
	// What is kept of the output while nobody listens.
	replaySize = 1 << 20
	// Counted for each kept event beside its bytes: a process may write one byte at a time.
	eventOverhead = 256
	// How long an ended process can still be asked for its end.
	keepEnded = 30 * time.Second
)

var errStdinClosed = errors.New("standard input is not open")

// Process is one started process. Output goes to its subscribers; while there are none it is kept,
// bounded. A slow subscriber slows the process down through its pipe.
type Process struct {
	config *processpb.ProcessConfig
	tag    *string
	pid    int

	cmd    *exec.Cmd
	stdin  *os.File
	pty    *os.File
	cgroup string
	// Serialises writers of stdin, so that chunks keep their order.
	stdinMu sync.Mutex

	mu          sync.Mutex
	subscribers map[*subscriber]struct{}
	replay      []*processpb.ProcessEvent
	replayBytes int
	dropped     uint64
	ended       *processpb.ProcessEvent
	reaped      bool
	timedOut    bool
}

type subscriber struct {
	events chan *processpb.ProcessEvent
	gone   chan struct{}
	once   sync.Once
}

func (s *subscriber) leave() { s.once.Do(func() { close(s.gone) }) }

// subscribe adds a listener that first gets the start, then what was kept, then what comes.
func (p *Process) subscribe() *subscriber {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := p.replay
	p.replay, p.replayBytes = nil, 0
	s := &subscriber{events: make(chan *processpb.ProcessEvent, len(kept)+2+queueLength), gone: make(chan struct{})}
	s.events <- &processpb.ProcessEvent{Event: &processpb.ProcessEvent_Start{
		Start: &processpb.ProcessEvent_StartEvent{Pid: uint32(p.pid), DroppedBytes: p.dropped},
	}}
	p.dropped = 0
	for _, event := range kept {
		s.events <- event
	}
	if p.ended != nil {
		s.events <- p.ended
		return s
	}
	p.subscribers[s] = struct{}{}
	return s
}

func (p *Process) unsubscribe(s *subscriber) {
	s.leave()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.subscribers, s)
}

// publish hands output to every subscriber, waiting for slow ones, or keeps it.
func (p *Process) publish(event *processpb.ProcessEvent) {
	for _, s := range p.keepOrList(event) {
		select {
		case s.events <- event:
		case <-s.gone:
		}
	}
}

func (p *Process) keepOrList(event *processpb.ProcessEvent) []*subscriber {
	p.mu.Lock()
	defer p.mu.Unlock()
	listeners := make([]*subscriber, 0, len(p.subscribers))
	for s := range p.subscribers {
		listeners = append(listeners, s)
	}
	if len(listeners) > 0 {
		return listeners
	}
	p.replay = append(p.replay, event)
	p.replayBytes += outputSize(event) + eventOverhead
	for p.replayBytes > replaySize {
		oldest := outputSize(p.replay[0])
		p.replay = p.replay[1:]
		p.replayBytes -= oldest + eventOverhead
		p.dropped += uint64(oldest)
	}
	return nil
}

func outputSize(event *processpb.ProcessEvent) int {
	data := event.GetData()
	return len(data.GetStdout()) + len(data.GetStderr()) + len(data.GetPty())
}

func (p *Process) finish(end *processpb.ProcessEvent) {
	p.mu.Lock()
	listeners := make([]*subscriber, 0, len(p.subscribers))
	for s := range p.subscribers {
		listeners = append(listeners, s)
	}
	p.ended = end
	p.mu.Unlock()
	for _, s := range listeners {
		select {
		case s.events <- end:
		case <-s.gone:
		}
	}
}

// pump copies one output of the process until its end, or until drain says that the process is
// gone: a grandchild that keeps the pipe open does not keep the stream open.
func (p *Process) pump(from *os.File, size int, wrap func([]byte) *processpb.ProcessEvent_DataEvent) {
	defer from.Close()
	buffer := make([]byte, size)
	for {
		n, err := from.Read(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n, err = readNow(from, buffer)
		}
		if n > 0 {
			p.publish(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: wrap(bytes.Clone(buffer[:n]))}})
		}
		if err != nil {
			return
		}
	}
}

// readNow reads what is in the pipe without waiting, deadline or not; an empty pipe is io.EOF.
func readNow(from *os.File, buffer []byte) (int, error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var readErr error
	// Control and not Read, which would refuse at once because the deadline has passed.
	if err := raw.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), buffer) }); err != nil {
		return 0, err
	}
	if readErr != nil || n <= 0 {
		return 0, io.EOF
	}
	return n, nil
}

// wait sees the process to its end and publishes it.
func (p *Process) wait(outputs []*os.File, pumps *sync.WaitGroup, limit *time.Timer) {
	// The zombie is left until nobody can signal its number any more.
	var info unix.Siginfo
	for unix.Waitid(unix.P_PID, p.pid, &info, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	p.reaped = true
	timedOut := p.timedOut
	p.mu.Unlock()
	_ = p.cmd.Wait()
	if limit != nil {
		limit.Stop()
	}
	for _, output := range outputs {
		_ = output.SetReadDeadline(time.Now())
	}
	pumps.Wait()
	p.closeStdin()
	if p.cgroup != "" {
		// Busy when the process left others behind; they may stay.
		_ = os.Remove(p.cgroup)
	}
	p.finish(endEvent(p.cmd.ProcessState, timedOut))
}

func endEvent(state *os.ProcessState, timedOut bool) *processpb.ProcessEvent {
	status := state.Sys().(syscall.WaitStatus)
	end := &processpb.ProcessEvent_EndEvent{
		ExitCode: int32(state.ExitCode()),
		Exited:   status.Exited(),
		Status:   state.String(),
		TimedOut: timedOut,
	}
	if status.Signaled() {
		end.Signal = int32(status.Signal())
		text := state.String()
		end.Error = &text
	}
	if timedOut {
		text := "deadline exceeded: the time limit of the process had passed"
		end.Error = &text
	}
	return &processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: end}}
}

// expire ends the process and all it started, because its time is over.
func (p *Process) expire() {
	p.mu.Lock()
	p.timedOut = !p.reaped
	p.mu.Unlock()
	_ = p.signal(unix.SIGKILL)
}

// signal reaches the process alone; SIGKILL reaches all it started.
func (p *Process) signal(number unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return os.ErrProcessDone
	}
	if number != unix.SIGKILL {
		return unix.Kill(p.pid, number)
	}
	if p.cgroup != "" {
		_ = os.WriteFile(filepath.Join(p.cgroup, "cgroup.kill"), []byte("1"), 0)
	}
	return unix.Kill(-p.pid, number)
}

// write sends bytes to stdin or the terminal, in order, until done is closed.
func (p *Process) write(data []byte, done <-chan struct{}) error {
	p.stdinMu.Lock()
	defer p.stdinMu.Unlock()
	to := p.stdin
	if p.pty != nil {
		to = p.pty
	}
	if to == nil {
		return errStdinClosed
	}
	_ = to.SetWriteDeadline(time.Time{})
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		select {
		case <-done:
			_ = to.SetWriteDeadline(time.Now())
		case <-finished:
		}
	}()
	_, err := to.Write(data)
	return err
}

func (p *Process) closeStdin() {
	p.stdinMu.Lock()
	defer p.stdinMu.Unlock()
	if p.stdin != nil {
		_ = p.stdin.Close()
		p.stdin = nil
	}
}

// newCgroup makes a control group for one process; none when the kernel offers none.
func newCgroup(sequence uint64) (string, *os.File) {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil || os.Geteuid() != 0 {
		return "", nil
	}
	path := filepath.Join("/sys/fs/cgroup", "process-"+strconv.FormatUint(sequence, 10))
	if err := os.Mkdir(path, 0o755); err != nil {
		return "", nil
	}
	opened, err := os.Open(path)
	if err != nil {
		_ = os.Remove(path)
		return "", nil
	}
	return path, opened
}

// resetScore makes a process an ordinary candidate when memory runs out; the agent is none.
func resetScore(pid int) {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("0"), 0)
}
