package filesystem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/users"
)

const (
	// Bytes of events that wait for the client. While there are more nothing is read, and the
	// kernel keeps what comes (fs.inotify.max_queued_events) until it, too, has enough.
	maxQueued     = 256 << 10
	eventOverhead = 256
	readSize      = 16 << 10
	// How long after a directory was moved away it may turn up elsewhere below the root: the
	// kernel tells both ends of a move one right after the other.
	moveTime = 50 * time.Millisecond
)

// What happens to the content of a directory, and, for the root, to itself.
const (
	watchedEvents = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK
	rootEvents    = unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
)

var (
	errLost       = errors.New("events were lost because they were not read in time; list the directory and watch it again")
	errTooLarge   = fmt.Errorf("more than %d directories, or than the kernel allows (fs.inotify.max_user_watches); watch a smaller tree", maxDirectories)
	errNotWatched = errors.New("events on a network mount are unreliable; set allow_network_mounts to watch it all the same")
)

type watchOptions struct{ recursive, entries, network bool }

// watcher turns what the kernel tells of one directory, or a tree, into events, with the rights
// of a user. It reads no further than its client does: a slow one makes nothing grow, and is told
// once the kernel has dropped events.
type watcher struct {
	user    *users.User
	root    string
	options watchOptions
	budget  *budget
	// Guarded by the table of watchers.
	asked time.Time

	file *os.File
	// Of file; used under mu alone, and only until it is closed.
	fd int
	// Has one element while there may be something to take.
	wake chan struct{}
	// Has one element once something was taken.
	room chan struct{}

	mu     sync.Mutex
	closed bool
	over   bool
	failed error
	queue  []*filesystempb.FilesystemEvent
	queued int
	buffer [readSize]byte
	names  *users.Names

	directories map[int32]*directory
	// Directories that were moved away, by the number that the other end of a move has too.
	moving map[uint32]*directory
	found  found
}

// newWatcher watches root, as the user in whose name this is called.
func newWatcher(user *users.User, root string, options watchOptions, budget *budget) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if errors.Is(err, unix.EMFILE) {
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("no more directories can be watched (fs.inotify.max_user_instances)"))
	}
	if err != nil {
		return nil, err
	}
	w := &watcher{
		user: user, root: root, options: options, budget: budget,
		file: os.NewFile(uintptr(fd), "inotify"), fd: fd,
		wake: make(chan struct{}, 1), room: make(chan struct{}, 1),
		directories: map[int32]*directory{}, moving: map[uint32]*directory{},
	}
	if err := w.watchRoot(); err != nil {
		w.close()
		return nil, watchError(err)
	}
	return w, nil
}

func (w *watcher) watchRoot() error {
	kind, err := kindOf(w.root)
	if err != nil {
		return err
	}
	if kind == network && !w.options.network {
		return fmt.Errorf("path '%s': %w", w.root, errNotWatched)
	}
	var stat unix.Stat_t
	if err := unix.Stat(w.root, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: %s", w.root))
	}
	number, err := unix.InotifyAddWatch(w.fd, w.root, watchedEvents|rootEvents)
	if errors.Is(err, unix.ENOSPC) || err == nil && !w.budget.take() {
		return errTooLarge
	}
	if err != nil {
		return &os.PathError{Op: "watch", Path: w.root, Err: err}
	}
	top := &directory{watch: int32(number), device: stat.Dev}
	w.directories[top.watch] = top
	if w.options.recursive {
		w.search(top, false)
	}
	return w.failed
}

// run reads until there is nothing more to read.
func (w *watcher) run() {
	defer w.close()
	raw, err := w.file.SyscallConn()
	if err != nil {
		w.fail(err)
		return
	}
	for {
		var now progress
		err := raw.Read(func(uintptr) bool {
			now = w.drain()
			return now != waiting
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			w.forgetMoved()
		case err != nil:
			w.fail(err)
			return
		case now == ended:
			return
		case now == crowded:
			<-w.room
		}
	}
}

// progress is why reading has stopped.
type progress int

const (
	waiting progress = iota // the kernel has nothing more to tell
	crowded                 // the client has not taken enough
	ended
)

// drain turns all that the kernel has to tell into events, or as much as the client can take.
func (w *watcher) drain() progress {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		switch {
		case w.closed || w.over:
			return ended
		case w.queued >= maxQueued:
			return crowded
		}
		n, err := unix.Read(w.fd, w.buffer[:])
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if w.found.empty() {
				return waiting
			}
			w.asUser(w.tellFound)
		case err != nil:
			w.finish(err)
		default:
			w.asUser(func() { w.handleAll(w.buffer[:n]) })
		}
	}
}

func (w *watcher) asUser(work func()) {
	w.names = users.NewNames()
	err := w.user.As(func() error {
		work()
		return nil
	})
	if err != nil {
		w.finish(err)
	}
}

func (w *watcher) handleAll(events []byte) {
	for len(events) >= unix.SizeofInotifyEvent && !w.over {
		// struct inotify_event, inotify(7): wd, mask, cookie, len, name.
		number := int32(binary.NativeEndian.Uint32(events))
		mask, cookie := binary.NativeEndian.Uint32(events[4:]), binary.NativeEndian.Uint32(events[8:])
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:size]), "\x00")
		events = events[size:]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			w.finish(errLost)
		} else if where, known := w.directories[number]; known {
			w.handle(where, name, mask, cookie)
		}
	}
}

func (w *watcher) handle(where *directory, name string, mask, cookie uint32) {
	switch {
	case mask&unix.IN_IGNORED != 0:
		w.forget(where)
		if where.parent == nil {
			w.finish(nil)
		}
	case name != "":
		w.tellFirst(where, name, mask&unix.IN_CREATE != 0)
		w.tell(where, name, typeOfEvent(mask))
		if w.options.recursive && mask&unix.IN_ISDIR != 0 {
			w.follow(where, name, mask, cookie)
		}
	case where.parent == nil:
		w.tell(where, ".", typeOfEvent(mask))
		if mask&unix.IN_MOVE_SELF != 0 {
			// Where it is now nobody knows.
			w.finish(nil)
		}
	}
}

func typeOfEvent(mask uint32) filesystempb.EventType {
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return filesystempb.EventType_EVENT_TYPE_CREATE
	case mask&unix.IN_MODIFY != 0:
		return filesystempb.EventType_EVENT_TYPE_WRITE
	case mask&(unix.IN_DELETE|unix.IN_DELETE_SELF) != 0:
		return filesystempb.EventType_EVENT_TYPE_REMOVE
	case mask&(unix.IN_MOVED_FROM|unix.IN_MOVE_SELF) != 0:
		return filesystempb.EventType_EVENT_TYPE_RENAME
	case mask&unix.IN_ATTRIB != 0:
		return filesystempb.EventType_EVENT_TYPE_CHMOD
	}
	return filesystempb.EventType_EVENT_TYPE_UNSPECIFIED
}

// tell queues one event.
func (w *watcher) tell(where *directory, name string, kind filesystempb.EventType) {
	if kind == filesystempb.EventType_EVENT_TYPE_UNSPECIFIED {
		return
	}
	path := where.path(name)
	event := &filesystempb.FilesystemEvent{Name: text(path), Type: kind}
	gone := kind == filesystempb.EventType_EVENT_TYPE_REMOVE || kind == filesystempb.EventType_EVENT_TYPE_RENAME
	if w.options.entries && !gone {
		full := filepath.Join(w.root, path)
		// What has vanished meanwhile has none.
		event.Entry, _ = describe(full, full, w.names)
	}
	// The kernel does so too with what nobody has read yet.
	if last := len(w.queue) - 1; last >= 0 && w.queue[last].GetName() == event.GetName() && w.queue[last].GetType() == kind {
		w.queued += sizeOfEvent(event) - sizeOfEvent(w.queue[last])
		w.queue[last] = event
		return
	}
	w.queue = append(w.queue, event)
	w.queued += sizeOfEvent(event)
	signal(w.wake)
}

func sizeOfEvent(event *filesystempb.FilesystemEvent) int {
	return eventOverhead + len(event.GetName()) + 2*proto.Size(event.GetEntry())
}

func signal(channel chan struct{}) {
	select {
	case channel <- struct{}{}:
	default:
	}
}

// take returns what is queued, whether that was the last, and why there will be no more.
func (w *watcher) take() (events []*filesystempb.FilesystemEvent, over bool, failed error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	events, w.queue, w.queued = w.queue, nil, 0
	signal(w.room)
	return events, w.over, watchError(w.failed)
}

// finish ends the events; what is queued can still be taken.
func (w *watcher) finish(failed error) {
	if !w.over {
		w.over, w.failed = true, failed
	}
	signal(w.wake)
}

func (w *watcher) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.finish(err)
}

// watchError is what the client is told.
func watchError(err error) error {
	switch {
	case errors.Is(err, errLost):
		return connect.NewError(connect.CodeDataLoss, err)
	case errors.Is(err, errTooLarge):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, errNotWatched):
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	return toConnect(err)
}

// close gives back all that the kernel keeps for it. Idempotent.
func (w *watcher) close() {
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		w.budget.give(len(w.directories))
		w.directories, w.moving, w.found = nil, nil, found{}
		signal(w.room)
	}
	w.mu.Unlock()
	// It waits for whoever reads, and that one for the lock.
	_ = w.file.Close()
}
