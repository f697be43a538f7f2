package filesystem

import (
	"path/filepath"
	"sync/atomic"
)

// Of all watchers: each costs the kernel about a kilobyte that cannot be swapped.
const maxDirectories = 32 << 10

// budget is how many directories are watched by all watchers.
type budget struct{ used atomic.Int64 }

func (b *budget) take() bool {
	if b.used.Add(1) <= maxDirectories {
		return true
	}
	b.used.Add(-1)
	return false
}

func (b *budget) give(n int) { b.used.Add(-int64(n)) }

// directory is one that is watched. Its path follows from its parents', so a move changes it for
// all below at once.
type directory struct {
	parent *directory // nil for the root
	name   string
	watch  int32 // the kernel's number of the watch
	device uint64
	below  map[string]*directory
}

// path returns the path of what the directory calls name, relative to the root.
func (d *directory) path(name string) string {
	if d.parent == nil {
		return name
	}
	return filepath.Join(d.parent.path(d.name), name)
}

func (d *directory) attach(parent *directory, name string) {
	if d.parent != nil && d.parent.below[d.name] == d {
		delete(d.parent.below, d.name)
	}
	d.parent, d.name = parent, name
	if parent == nil {
		return
	}
	if parent.below == nil {
		parent.below = map[string]*directory{}
	}
	parent.below[name] = d
}

// each calls visit with the directory and all below it.
func (d *directory) each(visit func(*directory)) {
	visit(d)
	for _, child := range d.below {
		child.each(visit)
	}
}
