package files

import (
	"compress/gzip"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sandmartin.dev/guest/internal/metadata"
	"sandmartin.dev/guest/internal/users"
)

// Of one form: the answer names them all.
const maxFiles = 10_000

func upload(w http.ResponseWriter, r *http.Request, at places, given string, idle time.Duration) error {
	kept, err := metadata.FromHeaders(r.Header)
	if err != nil {
		return err
	}
	kind, parameters, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	form := err == nil && strings.HasPrefix(kind, "multipart/")
	control := http.NewResponseController(w)
	body, announced, err := unpack(Arriving(r, control, idle), r)
	if err != nil {
		return err
	}
	var all []written
	if form {
		all, err = storeForm(multipart.NewReader(body, parameters["boundary"]), at, given, kept)
	} else {
		all, err = storeOne(body, at, given, kept, announced)
	}
	if err != nil {
		return err
	}
	// The next request on this connection may take its time again.
	_ = control.SetReadDeadline(time.Time{})
	answer(w, all)
	return nil
}

// Arriving is the body of a request, which fails when nothing comes for so long.
func Arriving(r *http.Request, control *http.ResponseController, idle time.Duration) io.Reader {
	return &arriving{r.Body, control, idle}
}

// arriving is content on its way: it may take as long as it likes, but must not stand still.
type arriving struct {
	body    io.Reader
	control *http.ResponseController
	idle    time.Duration
}

func (a *arriving) Read(buffer []byte) (int, error) {
	_ = a.control.SetReadDeadline(time.Now().Add(a.idle))
	n, err := a.body.Read(buffer)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = refusal{http.StatusRequestTimeout, "nothing of the content came for " + a.idle.String()}
	}
	return n, err
}

// unpack returns the content and how much of it there will be, or 0.
func unpack(body io.Reader, r *http.Request) (io.Reader, int64, error) {
	switch r.Header.Get("Content-Encoding") {
	case "", "identity":
		return body, r.ContentLength, nil
	case "gzip":
		unpacked, err := gzip.NewReader(body)
		if err != nil {
			return nil, 0, broken(err, "the body is not gzip: ")
		}
		// What is announced is the packed size.
		return unpacked, 0, nil
	}
	return nil, 0, refusal{http.StatusUnsupportedMediaType, "use Content-Encoding gzip or none"}
}

// broken is the error of content that cannot be understood, unless it has a status already.
func broken(err error, says string) error {
	var known refusal
	if errors.As(err, &known) {
		return known
	}
	return refusal{http.StatusBadRequest, says + err.Error()}
}

func storeOne(body io.Reader, at places, given string, kept map[string]string, announced int64) ([]written, error) {
	user, path, err := at.find(given)
	if err != nil {
		return nil, err
	}
	one, err := store(user, path, body, kept, announced)
	return []written{one}, err
}

// storeForm writes every part called file. given, where it is not empty, names the only one; else
// each is named by its file name, which may be a whole path.
func storeForm(form *multipart.Reader, at places, given string, kept map[string]string) ([]written, error) {
	var all []written
	for {
		part, err := form.NextPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, broken(err, "the body is not a form: ")
		}
		if part.FormName() != "file" {
			continue
		}
		if given != "" && len(all) > 0 || len(all) >= maxFiles {
			return nil, refusal{http.StatusBadRequest, "the form has too many files; a path in the query is for one alone"}
		}
		path := given
		if path == "" {
			path = fileName(part)
		}
		one, err := storeOne(part, at, path, kept, 0)
		if err != nil {
			return nil, err
		}
		all = append(all, one...)
	}
	if len(all) == 0 {
		return nil, refusal{http.StatusBadRequest, "the form has no part called file"}
	}
	return all, nil
}

// fileName is the whole of it: FileName of the part would be its last element.
func fileName(part *multipart.Part) string {
	_, parameters, err := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
	if err != nil {
		return ""
	}
	return parameters["filename"]
}

// store writes the content; on failure nothing of it is left. What was there before is given up
// only once the announced content has space and what is to be kept with it is.
func store(user *users.User, path string, body io.Reader, kept map[string]string, announced int64) (written, error) {
	one := written{Path: path, Name: filepath.Base(path), Type: "file", Metadata: kept}
	file, err := create(user, path, kept, announced)
	if err != nil {
		return one, err
	}
	if err = copyChecked(file, body); err == nil {
		return one, file.Close()
	}
	withdraw(user, path, file)
	return one, err
}
