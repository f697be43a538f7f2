// Package trees takes whole directories into the file system and gives them out, as plain tar, with
// root's rights.
//
// Others work in the same file system, and may change what they can between any two system calls. So
// every step is taken from the descriptor of the directory before it, a link is followed only where
// nobody but root could have made it, and what is given away is looked at through its descriptor.
package trees

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"sandmartin.dev/guest/internal/files"
	"sandmartin.dev/guest/internal/users"
)

const (
	maxPath = 4096
	// Said after the last byte of a tree: that it is whole, or why it is not.
	outcomeTrailer = "Sandmartin-Outcome"
	whole          = "whole"
)

// Handler serves /tree: GET reads what is at a path, POST unpacks what comes below a directory. A
// body that brings nothing for idle is given up.
func Handler(idle time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		at := query.Get("path")
		if !path.IsAbs(at) || strings.ContainsRune(at, 0) || len(at) > maxPath {
			files.Refuse(w, http.StatusBadRequest, "the path is not absolute, longer than 4096 bytes, or contains a NUL character")
			return
		}
		switch r.Method {
		case http.MethodGet:
			read(w, r, path.Clean(at))
		case http.MethodPost:
			write(w, r, path.Clean(at), query.Get("owner"), idle)
		default:
			w.Header().Set("Allow", "GET, POST")
			files.Refuse(w, http.StatusMethodNotAllowed, "use GET or POST")
		}
	})
}

func write(w http.ResponseWriter, r *http.Request, directory, named string, idle time.Duration) {
	given, err := ownerNamed(named)
	if err != nil {
		files.Refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	control := http.NewResponseController(w)
	members, err := unpack(files.Arriving(r, control, idle), directory, given)
	if err != nil {
		files.RefuseError(w, fmt.Errorf("%w (unpacked before: %d)", kindOf(err), members))
		return
	}
	// The next request on this connection may take its time again.
	_ = control.SetReadDeadline(time.Time{})
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]int{"members": members})
}

// kindOf marks errors that are the client's fault.
func kindOf(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, syscall.EINVAL) {
		return files.Invalid(err.Error())
	}
	return err
}

func read(w http.ResponseWriter, r *http.Request, at string) {
	from, err := find(at)
	if err != nil {
		files.RefuseError(w, err)
		return
	}
	defer from.close()
	w.Header().Set("Content-Type", "application/x-tar")
	w.Header().Set("Trailer", outcomeTrailer)
	// Whoever waits learns that it has begun, however long it takes until there is much to send.
	_ = http.NewResponseController(w).Flush()
	outcome := whole
	if err := from.pack(r.Context(), w); err != nil {
		outcome = url.PathEscape(err.Error())
	}
	w.Header().Set(outcomeTrailer, outcome)
}

// owner is who gets what is unpacked.
type owner struct{ uid, gid int }

// ownerNamed reads USER, USER:GROUP or numbers; nil for nothing, which leaves the numbers of the tar.
func ownerNamed(text string) (*owner, error) {
	if text == "" {
		return nil, nil
	}
	name, group, grouped := strings.Cut(text, ":")
	user, err := users.Find(name)
	if err != nil {
		return nil, err
	}
	gid := user.GID
	if grouped {
		if gid, err = users.FindGroup(group); err != nil {
			return nil, err
		}
	}
	return &owner{int(user.UID), int(gid)}, nil
}

// or returns the owner, which for nobody is what the tar has.
func (o *owner) or(header *tar.Header) (owner, error) {
	if o != nil {
		return *o, nil
	}
	for _, id := range []int{header.Uid, header.Gid} {
		// The largest number means "leave it" to the kernel.
		if id < 0 || id >= 1<<32-1 {
			return owner{}, files.Invalid("its owner " + strconv.Itoa(id) + " is no number of a user")
		}
	}
	return owner{header.Uid, header.Gid}, nil
}
