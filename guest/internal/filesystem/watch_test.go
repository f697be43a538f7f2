package filesystem

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/users"
)

// watching is a client that asks for the events of a directory.
type watching struct {
	t       *testing.T
	service *Service
	id      string
}

func watch(t *testing.T, s *Service, request *filesystempb.CreateWatcherRequest) *watching {
	t.Helper()
	answer, err := s.CreateWatcher(t.Context(), connect.NewRequest(request))
	if err != nil {
		t.Fatal(err)
	}
	w := &watching{t, s, answer.Msg.GetWatcherId()}
	t.Cleanup(func() { _ = w.stop() })
	return w
}

func (w *watching) stop() error {
	_, err := w.service.RemoveWatcher(context.Background(), connect.NewRequest(&filesystempb.RemoveWatcherRequest{WatcherId: w.id}))
	return err
}

func (w *watching) ask() ([]*filesystempb.FilesystemEvent, error) {
	answer, err := w.service.GetWatcherEvents(context.Background(), connect.NewRequest(&filesystempb.GetWatcherEventsRequest{WatcherId: w.id}))
	if err != nil {
		return nil, err
	}
	return answer.Msg.GetEvents(), nil
}

func shown(events []*filesystempb.FilesystemEvent) string {
	var all []string
	for _, event := range events {
		all = append(all, strings.TrimPrefix(event.GetType().String(), "EVENT_TYPE_")+" "+event.GetName())
	}
	return strings.Join(all, ", ")
}

// sees checks what has happened until now; a poll needs no waiting.
func (w *watching) sees(expected string) {
	w.t.Helper()
	events, err := w.ask()
	if got := shown(events); err != nil || got != expected {
		w.t.Errorf("expected: %s\ngot:      %s, %v", expected, got, err)
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func write(path, content string) error { return os.WriteFile(path, []byte(content), 0o644) }

func TestEachKindOfEvent(t *testing.T) {
	root := tree(t, "old")
	w := watch(t, service(t), &filesystempb.CreateWatcherRequest{Path: root})
	at := func(name string) string { return filepath.Join(root, name) }
	must(t, write(at("new"), "x"))
	w.sees("CREATE new, WRITE new")
	must(t, os.Chmod(at("new"), 0o600), os.Rename(at("new"), at("newer")), os.Remove(at("old")))
	w.sees("CHMOD new, RENAME new, CREATE newer, REMOVE old")
	must(t, os.Mkdir(at("dir"), 0o755), write(at("dir/inside"), "x"))
	w.sees("CREATE dir")
	must(t, write(at("\xff"), ""))
	w.sees("CREATE \uFFFD")
	w.sees("")
	must(t, os.Chmod(root, 0o700))
	w.sees("CHMOD .")
}

func TestATreeIsFollowed(t *testing.T) {
	root, outside := tree(t, "a/b/old"), tree(t, "away/x")
	w := watch(t, service(t), &filesystempb.CreateWatcherRequest{Path: root, Recursive: true})
	at := func(name string) string { return filepath.Join(root, name) }
	must(t, write(at("a/b/old"), "x"))
	w.sees("WRITE a/b/old")
	// Made before anybody can have begun to watch what they are in, and none is told twice.
	must(t, os.MkdirAll(at("n/e/w"), 0o755), write(at("n/e/w/file"), "x"), write(at("n/empty"), ""))
	events, err := w.ask()
	if got := sortedSet(t, events); err != nil || got != "CREATE n, CREATE n/e, CREATE n/e/w, CREATE n/e/w/file, CREATE n/empty, WRITE n/e/w/file" {
		t.Errorf("%s, %v", got, err)
	}
	// A move changes what everything below is called.
	must(t, os.Rename(at("n/e"), at("a/moved")))
	w.sees("RENAME n/e, CREATE a/moved")
	must(t, write(at("a/moved/w/file"), "more"))
	w.sees("WRITE a/moved/w/file")
	// What is moved in is watched, and what is moved out is not for long.
	must(t, os.Rename(filepath.Join(outside, "away"), at("in")))
	w.sees("CREATE in")
	must(t, write(at("in/x"), "x"))
	w.sees("WRITE in/x")
	must(t, os.Rename(at("in"), filepath.Join(outside, "out")))
	w.sees("RENAME in")
	waitFor(t, func() bool {
		must(t, write(filepath.Join(outside, "out", "x"), "again"))
		events, err := w.ask()
		return err == nil && len(events) == 0
	})
	must(t, os.RemoveAll(at("a/moved")))
	w.sees("REMOVE a/moved/w/file, REMOVE a/moved/w, REMOVE a/moved")
	if err := w.stop(); err != nil || w.service.watches.directories.used.Load() != 0 {
		t.Errorf("%v, %d directories are still counted", err, w.service.watches.directories.used.Load())
	}
}

func sortedSet(t *testing.T, events []*filesystempb.FilesystemEvent) string {
	t.Helper()
	all := strings.Split(shown(events), ", ")
	seen := map[string]bool{}
	for _, event := range all {
		if seen[event] {
			t.Errorf("%s is told twice", event)
		}
		seen[event] = true
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func waitFor(t *testing.T, condition func() bool) {
	t.Helper()
	for until := time.Now().Add(10 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the condition did not come true in time")
		}
	}
}

// Whatever the order in which the kernel's events and the searches come, everything that was made
// is told as made once, and what has content as written.
func TestATreeThatGrowsFasterThanItIsFollowed(t *testing.T) {
	root := tree(t)
	w := watch(t, service(t), &filesystempb.CreateWatcherRequest{Path: root, Recursive: true})
	expected := map[string]bool{}
	for n := range 300 {
		path := fmt.Sprintf("d%d/e/f", n)
		must(t, os.MkdirAll(filepath.Join(root, path), 0o755), write(filepath.Join(root, path, "file"), "x"))
		for _, made := range []string{path[:len(path)-4], path[:len(path)-2], path, path + "/file"} {
			expected["CREATE "+made] = true
		}
		expected["WRITE "+path+"/file"] = true
	}
	created := map[string]int{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("missing: %v", slices.Collect(maps.Keys(expected)))
		}
	})
	waitFor(t, func() bool {
		events, err := w.ask()
		must(t, err)
		for _, event := range events {
			name := shown([]*filesystempb.FilesystemEvent{event})
			if created[name]++; created[name] > 1 && strings.HasPrefix(name, "CREATE") {
				t.Fatalf("%s is told twice", name)
			}
			delete(expected, name)
		}
		return len(expected) == 0
	})
}

func TestEntriesInEvents(t *testing.T) {
	root := tree(t)
	w := watch(t, service(t), &filesystempb.CreateWatcherRequest{Path: root, IncludeEntry: true})
	file := filepath.Join(root, "file")
	must(t, write(file, "12345"))
	events, err := w.ask()
	must(t, err, os.Remove(file))
	if entry := events[len(events)-1].GetEntry(); entry.GetPath() != file || entry.GetSize() != 5 || entry.GetType() != filesystempb.FileType_FILE_TYPE_FILE {
		t.Errorf("got %v", entry)
	}
	if events, err = w.ask(); err != nil || shown(events) != "REMOVE file" || events[0].GetEntry() != nil {
		t.Errorf("got %v, %v", events, err)
	}
}

func TestAReaderThatIsTooSlowIsToldAndNothingGrows(t *testing.T) {
	limit, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	must(t, err)
	most, err := strconv.Atoi(strings.TrimSpace(string(limit)))
	must(t, err)
	if most > 100_000 {
		t.Skip("the kernel would keep too many events for this test")
	}
	root := tree(t)
	w := watch(t, service(t), &filesystempb.CreateWatcherRequest{Path: root})
	// Alternately, so that no two events that follow each other are the same.
	one, two := filepath.Join(root, "one"), filepath.Join(root, "two")
	must(t, write(one, ""), write(two, ""))
	for n := range most/2 + maxQueued/eventOverhead {
		must(t, os.Chmod(one, os.FileMode(0o600+n%2)), os.Chmod(two, os.FileMode(0o600+n%2)))
	}
	told := 0
	for {
		events, err := w.ask()
		if size := len(events) * eventOverhead; size > maxQueued+readSize*eventOverhead/unix.SizeofInotifyEvent {
			t.Fatalf("%d events were kept", len(events))
		}
		told += len(events)
		if err != nil {
			if connect.CodeOf(err) != connect.CodeDataLoss {
				t.Error(err)
			}
			break
		}
	}
	if told < most {
		t.Errorf("only %d events came before the loss", told)
	}
}

func TestTheWatchedDirectoryGoes(t *testing.T) {
	root := tree(t, "removed/", "moved/")
	for name, expected := range map[string]string{"removed": "REMOVE .", "moved": "RENAME ."} {
		path := filepath.Join(root, name)
		w := watch(t, service(t), &filesystempb.CreateWatcherRequest{Path: path})
		if name == "moved" {
			must(t, os.Rename(path, path+"-away"))
		} else {
			must(t, os.Remove(path))
		}
		w.sees(expected)
		w.sees("")
		must(t, w.stop())
	}
}

func TestWhatCannotBeWatched(t *testing.T) {
	root, s := tree(t, "file"), service(t)
	create := func(path string) error {
		_, err := s.CreateWatcher(t.Context(), connect.NewRequest(&filesystempb.CreateWatcherRequest{Path: path}))
		return err
	}
	ask := &watching{t, s, "unknown"}
	_, unknown := ask.ask()
	for name, c := range map[string]struct {
		err  error
		code connect.Code
	}{
		"missing":           {create(filepath.Join(root, "none")), connect.CodeNotFound},
		"a file":            {create(filepath.Join(root, "file")), connect.CodeInvalidArgument},
		"NUL":               {create("a\x00"), connect.CodeInvalidArgument},
		"nothing":           {create(""), connect.CodeInvalidArgument},
		"an unknown id":     {unknown, connect.CodeNotFound},
		"to stop a strange": {ask.stop(), connect.CodeNotFound},
	} {
		if connect.CodeOf(c.err) != c.code {
			t.Errorf("%s: %v is not %v", name, c.err, c.code)
		}
	}
	if len(s.watches.open) != 0 || s.watches.directories.used.Load() != 0 {
		t.Error("what failed is still counted")
	}
}

func TestAUserWatchesWhatItMayRead(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("taking on a user needs root")
	}
	nobody := &users.User{Name: "nobody", UID: 65534, GID: 65534, Groups: []uint32{65534}}
	root := tree(t, "open/", "shut/")
	for at := root; at != "/"; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		must(t, err, os.Chmod(at, info.Mode()|0o005))
	}
	must(t, os.Chmod(filepath.Join(root, "shut"), 0o700))
	s := NewService(func(_ http.Header, path string) (*users.User, string, error) { return nobody, path, nil })
	_, err := s.CreateWatcher(t.Context(), connect.NewRequest(&filesystempb.CreateWatcherRequest{Path: filepath.Join(root, "shut")}))
	if connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("%v", err)
	}
	w := watch(t, s, &filesystempb.CreateWatcherRequest{Path: root, Recursive: true})
	// Found to be shut when it is made, too.
	must(t, os.Mkdir(filepath.Join(root, "later"), 0o700), write(filepath.Join(root, "shut/x"), ""), write(filepath.Join(root, "later/x"), ""), write(filepath.Join(root, "open/x"), ""))
	w.sees("CREATE later, CREATE open/x")
}

func TestWatchersAreBounded(t *testing.T) {
	root, s := tree(t), service(t)
	create := func() (string, error) {
		answer, err := s.CreateWatcher(t.Context(), connect.NewRequest(&filesystempb.CreateWatcherRequest{Path: root}))
		if err != nil {
			return "", err
		}
		id := answer.Msg.GetWatcherId()
		t.Cleanup(func() { _ = (&watching{t, s, id}).stop() })
		return id, nil
	}
	first, err := create()
	must(t, err)
	for range maxWatchers - 1 {
		_, err := create()
		must(t, err)
	}
	if _, err := create(); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	s.watches.mu.Lock()
	s.watches.polled[first].asked = time.Now().Add(-2 * abandoned)
	s.watches.mu.Unlock()
	if _, err := create(); err != nil {
		t.Errorf("in place of an abandoned one: %v", err)
	}
	if _, err := (&watching{t, s, first}).ask(); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("the abandoned one: %v", err)
	}
}

func TestNetworkMounts(t *testing.T) {
	for path, expected := range map[string]mountKind{"/proc": kernel, "/sys": kernel, t.TempDir(): disk} {
		if kind, err := kindOf(path); err != nil || kind != expected {
			t.Errorf("%s: %v, %v", path, kind, err)
		}
	}
}
