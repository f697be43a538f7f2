package process

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processpb "sandmartin.dev/guest/internal/gen/process"
	"sandmartin.dev/guest/internal/gen/process/processconnect"
	"sandmartin.dev/guest/internal/identity"
	"sandmartin.dev/guest/internal/users"
)

const patience = 10 * time.Second

// serve runs the service behind a real server, with the user who runs the tests.
func serve(t *testing.T) (processconnect.ProcessClient, context.Context) {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	service := NewService(identity.New(true), func(http.Header) (*users.User, error) { return users.Find(me.Username) }, "")
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(service))
	server := httptest.NewServer(KeepLimit(mux))
	// Not a deadline, which the client would send as the process's time limit.
	ctx, cancel := context.WithCancel(t.Context())
	timer := time.AfterFunc(patience, cancel)
	t.Cleanup(func() { timer.Stop(); cancel(); server.Close() })
	return processconnect.NewProcessClient(server.Client(), server.URL, connect.WithProtoJSON()), ctx
}

type told struct {
	pid         uint32
	stdout, pty string
	end         *processpb.ProcessEvent_EndEvent
	keepalives  int
}

// listen reads a stream until its end, or until stop says that enough is known.
func (g *told) listen(stream *connect.ServerStreamForClient[processpb.StartResponse], stop func(*told) bool) error {
	for stream.Receive() {
		switch event := stream.Msg().GetEvent().GetEvent().(type) {
		case *processpb.ProcessEvent_Start:
			g.pid = event.Start.GetPid()
		case *processpb.ProcessEvent_Data:
			g.stdout += string(event.Data.GetStdout())
			g.pty += string(event.Data.GetPty())
		case *processpb.ProcessEvent_End:
			g.end = event.End
		case *processpb.ProcessEvent_Keepalive:
			g.keepalives++
		}
		if stop != nil && stop(g) {
			return nil
		}
	}
	return stream.Err()
}

func script(text string) *processpb.StartRequest {
	return &processpb.StartRequest{Process: &processpb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", text}}}
}

func start(t *testing.T, ctx context.Context, client processconnect.ProcessClient, request *processpb.StartRequest, headers ...string) *connect.ServerStreamForClient[processpb.StartResponse] {
	t.Helper()
	asked := connect.NewRequest(request)
	for n := 0; n < len(headers); n += 2 {
		asked.Header().Set(headers[n], headers[n+1])
	}
	stream, err := client.Start(ctx, asked)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stream.Close() })
	return stream
}

func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	_, state, _ := strings.Cut(string(stat), ") ")
	return err == nil && !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("did not happen: " + what)
		}
	}
}

func TestTheTimeLimitEndsTheGroup(t *testing.T) {
	client, ctx := serve(t)
	var got told
	stream := start(t, ctx, client, script("sleep 300 & echo $!; wait"), limitHeader, "200", timeoutHeader, "100")
	if err := got.listen(stream, nil); err != nil {
		t.Fatal(err)
	}
	if !got.end.GetTimedOut() || got.end.GetSignal() != int32(unix.SIGKILL) || got.end.GetExited() {
		t.Errorf("the end is %v", got.end)
	}
	child, err := strconv.Atoi(strings.TrimSpace(got.stdout))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child ends", func() bool { return !alive(child) })
}

func TestADeadlineIsToldAndEndsTheGroup(t *testing.T) {
	for range 5 {
		client, ctx := serve(t)
		var got told
		stream := start(t, ctx, client, script("sleep 300 & echo $!; wait"), timeoutHeader, "700")
		if err := got.listen(stream, nil); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
			t.Fatalf("the deadline is told as %v, and the end as %v", err, got.end)
		}
		child, err := strconv.Atoi(strings.TrimSpace(got.stdout))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the child ends", func() bool { return !alive(child) })
	}
}

func TestALimitThatIsNoneEndsNothing(t *testing.T) {
	for _, limit := range []string{"0", "-5", "much", "99999999999999999999", "9300000000000"} {
		client, ctx := serve(t)
		var got told
		if err := got.listen(start(t, ctx, client, script("exit 3"), limitHeader, limit), nil); err != nil || got.end.GetExitCode() != 3 {
			t.Errorf("limit %s: %v, %v", limit, got.end, err)
		}
	}
}

func TestKeepalivesAreSentWhileItIsQuiet(t *testing.T) {
	client, ctx := serve(t)
	for _, interval := range []string{"1", "9223372037"} {
		var got told
		stream := start(t, ctx, client, script("echo $$; read line"), "Keepalive-Ping-Interval", interval)
		quiet := interval == "1"
		if err := got.listen(stream, func(g *told) bool { return g.stdout != "" && (!quiet || g.keepalives > 0) }); err != nil {
			t.Fatal(err)
		}
		if _, err := client.SendSignal(ctx, connect.NewRequest(&processpb.SendSignalRequest{Process: byPid(got.pid), Signal: processpb.Signal_SIGNAL_SIGKILL})); err != nil {
			t.Fatal(err)
		}
	}
}

func byPid(pid uint32) *processpb.ProcessSelector {
	return &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: pid}}
}

func TestTerminal(t *testing.T) {
	client, ctx := serve(t)
	request := script(`stty size; tty -s && echo tty; read line; stty size; echo "<$line>"; exit 6`)
	request.Pty = &processpb.PTY{Size: &processpb.PTY_Size{Cols: 132, Rows: 43}}
	stream := start(t, ctx, client, request)
	var got told
	if err := got.listen(stream, func(g *told) bool { return strings.Contains(g.pty, "tty\r\n") }); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(got.pty, "43 132\r\n") {
		t.Errorf("the terminal shows %q", got.pty)
	}
	resized := &processpb.UpdateRequest{Process: byPid(got.pid), Pty: &processpb.PTY{Size: &processpb.PTY_Size{Cols: 70, Rows: 20}}}
	if _, err := client.Update(ctx, connect.NewRequest(resized)); err != nil {
		t.Fatal(err)
	}
	typed := &processpb.ProcessInput{Input: &processpb.ProcessInput_Pty{Pty: []byte("hey\r")}}
	if _, err := client.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: byPid(got.pid), Input: typed})); err != nil {
		t.Fatal(err)
	}
	if err := got.listen(stream, nil); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(got.pty, "20 70\r\n<hey>\r\n") || got.end.GetExitCode() != 6 {
		t.Errorf("the terminal shows %q at the end, %v", got.pty, got.end)
	}
}

// A writer that gives up on a full terminal or pipe must neither block the next nor cut it off.
func TestAWriterThatGivesUpDoesNotCutOffTheNext(t *testing.T) {
	for name, size := range map[string]*processpb.PTY{"pipe": nil, "terminal": {}} {
		t.Run(name, func(t *testing.T) {
			client, ctx := serve(t)
			request := script("stty raw -echo 2>/dev/null; echo ready; kill -STOP $$; exec cat")
			request.Pty = size
			stream := start(t, ctx, client, request)
			var got told
			if err := got.listen(stream, func(g *told) bool { return strings.Contains(g.stdout+g.pty, "ready") }); err != nil {
				t.Fatal(err)
			}
			send := func(ctx context.Context, data string) error {
				input := &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: []byte(data)}}
				_, err := client.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: byPid(got.pid), Input: input}))
				return err
			}
			for range 20 {
				brief, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
				if err := send(brief, strings.Repeat("x", 1<<20)); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
					t.Fatalf("a writer to a stopped process: %v", err)
				}
				cancel()
			}
			if err := unix.Kill(int(got.pid), unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			sent := make(chan error, 1)
			go func() { sent <- send(ctx, "the last words") }()
			if err := got.listen(stream, func(g *told) bool { return strings.Contains(g.stdout+g.pty, "the last words") }); err != nil {
				t.Fatal(err)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
			_ = unix.Kill(int(got.pid), unix.SIGKILL)
		})
	}
}

func TestATagMeansTheProcessThatRuns(t *testing.T) {
	client, ctx := serve(t)
	tag := "worker"
	for range 5 {
		request := script("exit 1")
		request.Tag = &tag
		if err := new(told).listen(start(t, ctx, client, request), nil); err != nil {
			t.Fatal(err)
		}
	}
	request := script("read line; exit 2")
	request.Tag = &tag
	stream := start(t, ctx, client, request)
	var got told
	if err := got.listen(stream, func(g *told) bool { return g.pid != 0 }); err != nil {
		t.Fatal(err)
	}
	selector := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Tag{Tag: tag}}
	if _, err := client.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: selector})); err != nil {
		t.Fatal(err)
	}
	if err := got.listen(stream, nil); err != nil || got.end.GetExitCode() != 2 {
		t.Errorf("the end is %v, %v", got.end, err)
	}
	list, err := client.List(ctx, connect.NewRequest(&processpb.ListRequest{}))
	if err != nil || len(list.Msg.GetProcesses()) != 0 {
		t.Errorf("ended processes are listed: %v, %v", list, err)
	}
}

func TestStreamedInputNeedsItsProcessFirst(t *testing.T) {
	client, ctx := serve(t)
	stream := client.StreamInput(ctx)
	data := &processpb.StreamInputRequest_DataEvent{Input: &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: []byte("x")}}}
	_ = stream.Send(&processpb.StreamInputRequest{Event: &processpb.StreamInputRequest_Data{Data: data}})
	if _, err := stream.CloseAndReceive(); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("got %v", err)
	}
	running := start(t, ctx, client, script("cat"))
	var got told
	if err := got.listen(running, func(g *told) bool { return g.pid != 0 }); err != nil {
		t.Fatal(err)
	}
	stream = client.StreamInput(ctx)
	for _, message := range []*processpb.StreamInputRequest{
		{Event: &processpb.StreamInputRequest_Start{Start: &processpb.StreamInputRequest_StartEvent{Process: byPid(got.pid)}}},
		{Event: &processpb.StreamInputRequest_Keepalive{Keepalive: &processpb.StreamInputRequest_KeepAlive{}}},
		{Event: &processpb.StreamInputRequest_Data{Data: data}},
	} {
		if err := stream.Send(message); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := stream.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: byPid(got.pid)})); err != nil {
		t.Fatal(err)
	}
	if err := got.listen(running, nil); err != nil || got.stdout != "x" {
		t.Errorf("got %q, %v", got.stdout, err)
	}
}

func TestControlGroupsAreGivenBack(t *testing.T) {
	root := t.TempDir()
	none := cgroups{root: filepath.Join(root, "none")}
	none.prepare()
	if found := none.take(); found != (group{}) {
		t.Error("a group where the kernel offers none")
	}
	if err := os.WriteFile(filepath.Join(root, "cgroup.controllers"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	groups := cgroups{root: root}
	groups.prepare()
	ahead := groups.spare
	taken, fresh := groups.take(), groups.take()
	if taken != ahead || fresh == ahead {
		t.Errorf("%v was made ahead; taken are %v and %v", ahead, taken, fresh)
	}
	taken.close()
	fresh.close()
	first, second := taken.path, fresh.path
	// A directory with something in it stands for a group with a process in it.
	left := filepath.Join(first, "left")
	if err := os.Mkdir(left, 0o755); err != nil {
		t.Fatal(err)
	}
	groups.release(first)
	if _, err := os.Stat(first); err != nil {
		t.Error("a busy group is gone")
	}
	_ = os.Remove(left)
	groups.release(second)
	for _, path := range []string{first, second} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s was not given back", path)
		}
	}
}

func TestAGroupThatWasRemovedMeanwhileIsMadeAnew(t *testing.T) {
	root := controlGroup(t)
	me, err := users.Find(strconv.Itoa(os.Geteuid()))
	if err != nil {
		t.Fatal(err)
	}
	service := NewService(identity.New(true), nil, root)
	service.Prepare()
	if err := os.Remove(service.groups.spare.path); err != nil {
		t.Fatal(err)
	}
	p, listener, err := service.begin(me, script("cat /proc/self/cgroup; exec sleep 300 & exit 5"), 0)
	if err != nil {
		t.Fatal(err)
	}
	output := ""
	for ended := false; !ended; {
		<-listener.wake
		if event := p.take(listener); event != nil {
			output += string(event.GetData().GetStdout())
			ended = event.GetEnd() != nil
		}
	}
	if !strings.Contains(output, filepath.Base(p.cgroup)) {
		t.Errorf("the process was in %q, not in %s", output, p.cgroup)
	}
	// What it left behind is found by its group.
	kill(t, p.cgroup)
	for until := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		service.groups.release(p.cgroup)
		if _, err := os.Stat(p.cgroup); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(until) {
			t.Fatal("the group was not given back")
		}
	}
}

// controlGroup makes a group for a test, removed at its end with the groups in it.
func controlGroup(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("control groups need root")
	}
	for _, mounted := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(mounted, "cgroup.controllers")); err != nil {
			continue
		}
		root, err := os.MkdirTemp(mounted, "sandmartin-test-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { removeGroup(t, root) })
		return root
	}
	t.Skip("this host has no control groups of version 2")
	return ""
}

func removeGroup(t *testing.T, root string) {
	for until := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		inner, _ := filepath.Glob(filepath.Join(root, "process-*"))
		for _, path := range inner {
			_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
			_ = os.Remove(path)
		}
		if err := os.Remove(root); err == nil {
			return
		} else if time.Now().After(until) {
			t.Fatal(err)
		}
	}
}

func kill(t *testing.T, group string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
}
