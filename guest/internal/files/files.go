// Package files serves /files: content of any size, streamed in bounded memory, with the rights
// of the user who asks.
//
// An upload is written in place. One that fails is removed and reported, so a client never takes
// half a file for a whole one.
package files

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"syscall"
	"time"

	"sandmartin.dev/guest/internal/metadata"
	"sandmartin.dev/guest/internal/users"
)

// UploadIdle is how long an upload may bring nothing before it is given up.
const UploadIdle = 5 * time.Minute

// Locate finds the account called name, or else the one that the headers name, or the default
// one, and the absolute path meant.
type Locate func(header http.Header, name, path string) (*users.User, string, error)

// Handler serves /files: GET and HEAD read one, POST writes one or more.
func Handler(locate Locate, idle time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		at := places{locate, r.Header, query.Get("username")}
		var err error
		switch r.Method {
		case http.MethodGet, http.MethodHead:
			err = download(w, r, at, query.Get("path"))
		case http.MethodPost:
			err = upload(w, r, at, query.Get("path"), idle)
		default:
			w.Header().Set("Allow", "GET, HEAD, POST")
			err = refusal{http.StatusMethodNotAllowed, "use GET, HEAD or POST"}
		}
		if err != nil {
			RefuseError(w, err)
		}
	})
}

// places finds what one request means by paths.
type places struct {
	locate Locate
	header http.Header
	user   string
}

func (p places) find(path string) (*users.User, string, error) {
	if path == "" || strings.ContainsRune(path, 0) {
		return nil, "", refusal{http.StatusBadRequest, "the path is empty or contains a NUL character"}
	}
	user, path, err := p.locate(p.header, p.user, path)
	if err != nil {
		return nil, "", refusal{http.StatusUnauthorized, err.Error()}
	}
	return user, path, nil
}

// written is what is told of a file that was written.
type written struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

func answer(w http.ResponseWriter, told any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(told)
}

// refusal is an error that has a status of its own.
type refusal struct {
	status int
	reason string
}

func (r refusal) Error() string { return r.reason }

// Invalid is the error of a request that can never work as it is.
func Invalid(reason string) error { return refusal{http.StatusBadRequest, reason} }

// Refuse answers with an error in the form E2B's clients read.
func Refuse(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"code": status, "message": message})
}

// RefuseError answers with an error, and the status that tells its kind.
func RefuseError(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	var known refusal
	switch {
	case errors.As(err, &known):
		status = known.status
	case errors.Is(err, fs.ErrNotExist):
		status = http.StatusNotFound
	case errors.Is(err, fs.ErrPermission):
		status = http.StatusForbidden
	case errors.Is(err, errNotRegular), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, errCut), errors.Is(err, metadata.ErrInvalid):
		status = http.StatusBadRequest
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		status = http.StatusInsufficientStorage
		err = fmt.Errorf("not enough disk space: %w", err)
	case errors.Is(err, syscall.ETXTBSY), errors.Is(err, syscall.EROFS), errors.Is(err, syscall.ELOOP):
		status = http.StatusForbidden
	}
	Refuse(w, status, err.Error())
}

var (
	errNotRegular = errors.New("is not a regular file")
	errCut        = errors.New("the content is cut short or damaged")
)
