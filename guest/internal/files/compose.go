package files

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/users"
)

const maxComposition = 4 << 20

// composition is the order to make one file of several, which are used up.
type composition struct {
	Sources     []string `json:"source_paths"`
	Destination string   `json:"destination"`
	User        string   `json:"username"`
}

// Composer serves POST /files/compose.
func Composer(locate Locate) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var order composition
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxComposition)).Decode(&order)
		if err != nil || len(order.Sources) == 0 || len(order.Sources) > maxFiles {
			Refuse(w, http.StatusBadRequest, fmt.Sprintf("the body must be JSON with 1 to %d source_paths and a destination", maxFiles))
			return
		}
		made, err := compose(places{locate, r.Header, order.User}, order)
		if err != nil {
			RefuseError(w, err)
			return
		}
		answer(w, made)
	})
}

// compose writes beside the destination and renames over it, so the destination may be one of
// the sources and is never half made.
func compose(at places, order composition) (written, error) {
	user, path, err := at.find(order.Destination)
	if err != nil {
		return written{}, err
	}
	sources := make([]string, len(order.Sources))
	for i, given := range order.Sources {
		if _, sources[i], err = at.find(given); err != nil {
			return written{}, err
		}
	}
	beside := filepath.Join(filepath.Dir(path), "."+rand.Text())
	size, err := sizeOf(user, sources, path)
	if err == nil {
		err = concatenate(user, beside, sources, size)
	}
	if err != nil {
		return written{}, err
	}
	err = user.Within([]string{path}, func(raised bool) error { return replace(path, beside, raised) })
	if err != nil {
		return written{}, errors.Join(err, user.Within([]string{beside}, func(bool) error { return os.Remove(beside) }))
	}
	err = user.Within(sources, func(bool) error { return removeOthers(sources, path) })
	return written{Path: path, Name: filepath.Base(path), Type: "file"}, err
}

// replace puts what was made in the place of path; with root's rights that stays whose it was.
func replace(path, by string, raised bool) error {
	var old unix.Stat_t
	if raised && unix.Lstat(path, &old) == nil {
		if err := errors.Join(os.Lchown(by, int(old.Uid), int(old.Gid)), os.Chmod(by, os.FileMode(old.Mode&0o777))); err != nil {
			return err
		}
	}
	return os.Rename(by, path)
}

func concatenate(user *users.User, path string, sources []string, size int64) error {
	to, err := create(user, path, nil, size)
	if err != nil {
		return err
	}
	for _, source := range sources {
		if err = appendTo(to, user, source); err != nil {
			break
		}
	}
	if err == nil {
		return to.Close()
	}
	withdraw(user, path, to)
	return err
}

// sizeOf returns the size of all sources, and refuses a destination that is no file.
func sizeOf(user *users.User, sources []string, destination string) (size int64, err error) {
	err = user.As(func() error {
		if info, err := os.Stat(destination); err == nil && !info.Mode().IsRegular() {
			return fmt.Errorf("path '%s' %w", destination, errNotRegular)
		}
		for _, source := range sources {
			info, err := os.Stat(source)
			if err != nil {
				return err
			}
			size += info.Size()
		}
		return nil
	})
	return size, err
}

func appendTo(to *os.File, user *users.User, source string) error {
	from, info, err := open(user, source)
	if err != nil {
		return err
	}
	defer from.Close()
	// Where the file system can, the content is shared and not copied. No more than was asked
	// for: a source may be growing.
	if _, err = io.CopyN(to, from, info.Size()); errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: '%s' has become shorter", errCut, source)
	}
	return err
}

func removeOthers(sources []string, path string) error {
	made, err := os.Lstat(path)
	if err != nil {
		return err
	}
	for _, source := range sources {
		if info, err := os.Lstat(source); err == nil && os.SameFile(info, made) {
			continue
		}
		if err := os.Remove(source); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}
