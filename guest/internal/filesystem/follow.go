package filesystem

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
)

const (
	searchStep = 256
	// Of what was found and not told yet.
	maxFound = 32 << 10
)

// found is what was already there when a new directory began to be watched. Each is told as made
// once it is certain that the kernel will not tell so itself, which it does of what was made
// after the watch and before the search.
type found struct {
	order   []place
	written map[place]bool
}

type place struct {
	where *directory
	name  string
}

func (f *found) empty() bool { return len(f.order) == 0 }

func (f *found) add(at place, written bool) {
	if f.written == nil {
		f.written = map[place]bool{}
	}
	f.written[at] = written
	f.order = append(f.order, at)
}

// tellFound tells what was found, as much as the client can take.
func (w *watcher) tellFound() {
	for !w.found.empty() && w.queued < maxQueued {
		first := w.found.order[0]
		w.found.order = w.found.order[1:]
		w.tellFirst(first.where, first.name, false)
	}
	if w.found.empty() {
		w.found = found{}
	}
}

// tellFirst tells what was found, if it was, unless the kernel is just telling that it was made.
func (w *watcher) tellFirst(where *directory, name string, made bool) {
	written, waits := w.found.written[place{where, name}]
	if !waits {
		return
	}
	delete(w.found.written, place{where, name})
	if made {
		return
	}
	w.tell(where, name, filesystempb.EventType_EVENT_TYPE_CREATE)
	if written {
		w.tell(where, name, filesystempb.EventType_EVENT_TYPE_WRITE)
	}
}

// follow keeps the tree as the disk has it: name, a directory, was made, moved or removed.
func (w *watcher) follow(where *directory, name string, mask, cookie uint32) {
	switch {
	case mask&unix.IN_CREATE != 0:
		w.enter(where, name, true)
	case mask&unix.IN_MOVED_FROM != 0:
		if moved, ok := where.below[name]; ok {
			if len(w.moving) == 0 {
				_ = w.file.SetReadDeadline(time.Now().Add(moveTime))
			}
			w.moving[cookie] = moved
		}
	case mask&unix.IN_MOVED_TO != 0:
		if moved, ok := w.moving[cookie]; ok {
			delete(w.moving, cookie)
			moved.attach(where, name)
			return
		}
		w.enter(where, name, false)
	}
}

// forgetMoved ends the watches on what was moved out of the tree.
func (w *watcher) forgetMoved() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	_ = w.file.SetReadDeadline(time.Time{})
	for _, moved := range w.moving {
		moved.each(func(d *directory) {
			_, _ = unix.InotifyRmWatch(w.fd, uint32(d.watch))
			w.forgetOne(d)
		})
		moved.attach(nil, "")
	}
	clear(w.moving)
}

// forget takes a directory whose watch has ended out of the tree.
func (w *watcher) forget(d *directory) {
	w.forgetOne(d)
	if d.parent != nil && d.parent.below[d.name] == d {
		delete(d.parent.below, d.name)
	}
}

func (w *watcher) forgetOne(d *directory) {
	if _, known := w.directories[d.watch]; known {
		delete(w.directories, d.watch)
		w.budget.give(1)
	}
}

// enter watches a directory below another, and all below it. What has vanished, is closed to the
// user or is no place for watching is left out. With tell, what is there already is found.
func (w *watcher) enter(parent *directory, name string, tell bool) {
	path := filepath.Join(w.root, parent.path(name))
	var stat unix.Stat_t
	if unix.Lstat(path, &stat) != nil || stat.Dev != parent.device && !w.crosses(path) {
		return
	}
	// It may be watched already, since its parent was searched. To watch it again would, for a
	// moment, have the kernel tell nothing of it.
	number, err := unix.InotifyAddWatch(w.fd, path, watchedEvents|unix.IN_DONT_FOLLOW|unix.IN_MASK_CREATE)
	if errors.Is(err, unix.ENOSPC) {
		w.finish(errTooLarge)
	}
	if err != nil {
		return
	}
	if !w.budget.take() {
		w.finish(errTooLarge)
		return
	}
	entered := &directory{watch: int32(number), device: stat.Dev}
	entered.attach(parent, name)
	w.directories[entered.watch] = entered
	w.search(entered, tell)
}

// search enters the directories that a directory has.
func (w *watcher) search(where *directory, tell bool) {
	opened, err := os.Open(filepath.Join(w.root, where.path("")))
	if err != nil {
		return
	}
	defer opened.Close()
	for err == nil && !w.over {
		var entries []os.DirEntry
		entries, err = opened.ReadDir(searchStep)
		for _, entry := range entries {
			if tell {
				w.find(where, entry)
			}
			if entry.IsDir() && !w.over {
				w.enter(where, entry.Name(), tell)
			}
		}
	}
}

func (w *watcher) find(where *directory, entry os.DirEntry) {
	if len(w.found.order) >= maxFound {
		w.finish(errLost)
		return
	}
	info, err := entry.Info()
	written := err == nil && info.Mode().IsRegular() && info.Size() > 0
	w.found.add(place{where, entry.Name()}, written)
}

// crosses tells whether a tree goes on at a mount: not into the kernel's own files, and only with
// the client's leave onto a network's.
func (w *watcher) crosses(path string) bool {
	kind, err := kindOf(path)
	return err == nil && (kind == disk || kind == network && w.options.network)
}

type mountKind int

const (
	disk mountKind = iota
	network
	kernel
)

// Magic numbers that golang.org/x/sys does not name, statfs(2).
const (
	cephMagic = 0x00c36400
	gfs2Magic = 0x01161970
	ocfsMagic = 0x7461636f
)

func kindOf(path string) (mountKind, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return disk, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	// Truncated as the kernel's 32-bit numbers are.
	switch uint32(stat.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, unix.V9FS_MAGIC,
		unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC, unix.CODA_SUPER_MAGIC, unix.NCP_SUPER_MAGIC, cephMagic, gfs2Magic, ocfsMagic:
		return network, nil
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.DEVPTS_SUPER_MAGIC:
		return kernel, nil
	}
	return disk, nil
}
