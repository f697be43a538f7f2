package files

import (
	"bytes"
	"encoding/json"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/metadata"
)

type formPart struct{ field, name, content string }

func form(t *testing.T, parts ...formPart) (io.Reader, string) {
	t.Helper()
	var body bytes.Buffer
	writer := multipart.NewWriter(&body)
	for _, part := range parts {
		into, err := writer.CreateFormFile(part.field, part.name)
		if err == nil {
			_, err = io.WriteString(into, part.content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	return &body, writer.FormDataContentType()
}

func holds(t *testing.T, path, expected string) {
	t.Helper()
	if content, err := os.ReadFile(path); err != nil || string(content) != expected {
		t.Errorf("%s holds %.40q, %v", path, content, err)
	}
}

func TestForms(t *testing.T) {
	base, directory := serve(t), t.TempDir()
	at := func(name string) string { return filepath.Join(directory, name) }
	large := strings.Repeat("x", 3*BlockSize)
	body, kind := form(t, formPart{"file", at("made/ü 1"), "one"}, formPart{"other", "ignored", "no"}, formPart{"file", at("2"), large})
	status, answer := post(t, base, "", body, "Content-Type", kind)
	var told []written
	if err := json.Unmarshal([]byte(answer), &told); err != nil || status != http.StatusOK {
		t.Fatalf("%d %s", status, answer)
	}
	if expected := []written{{at("made/ü 1"), "ü 1", "file", nil}, {at("2"), "2", "file", nil}}; !reflect.DeepEqual(told, expected) {
		t.Errorf("told %v", told)
	}
	holds(t, at("made/ü 1"), "one")
	holds(t, at("2"), large)

	// The query's path goes before the part's own name.
	body, kind = form(t, formPart{"file", "elsewhere", "three"})
	if status, answer := post(t, base, at("3"), body, "Content-Type", kind); status != http.StatusOK {
		t.Errorf("%d %s", status, answer)
	}
	holds(t, at("3"), "three")
	for name, parts := range map[string][]formPart{
		"two for one path":  {{"file", "a", ""}, {"file", "b", ""}},
		"none of that name": {{"other", "a", ""}},
		"none at all":       {},
	} {
		body, kind := form(t, parts...)
		if status, answer := post(t, base, at("4"), body, "Content-Type", kind); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
	body, kind = form(t, formPart{"file", at("cut"), large})
	cut := io.LimitReader(body, BlockSize)
	if status, answer := post(t, base, "", cut, "Content-Type", kind); status != http.StatusBadRequest {
		t.Errorf("cut short: %d %s", status, answer)
	}
	if _, err := os.Lstat(at("cut")); err == nil {
		t.Error("half of a file is left")
	}
}

func TestMetadataIsReplacedWithEachUpload(t *testing.T) {
	base, path := serve(t), filepath.Join(t.TempDir(), "file")
	send := func(headers ...string) (int, string) {
		return post(t, base, path, strings.NewReader("x"), headers...)
	}
	if status, answer := send("X-Metadata-Author-Name", "ann", "X-Metadata-b", "2"); status != http.StatusOK {
		if strings.Contains(answer, "file system keeps none") {
			t.Skip("this file system has no attributes")
		}
		t.Fatalf("%d %s", status, answer)
	} else if !strings.Contains(answer, `"metadata":{"author-name":"ann","b":"2"}`) {
		t.Error(answer)
	}
	if got := metadata.Read(path); !reflect.DeepEqual(got, map[string]string{"author-name": "ann", "b": "2"}) {
		t.Errorf("kept %v", got)
	}
	if status, _ := send("X-Metadata-B", "3"); status != http.StatusOK || !reflect.DeepEqual(metadata.Read(path), map[string]string{"b": "3"}) {
		t.Errorf("kept %v", metadata.Read(path))
	}
	for name, headers := range map[string][]string{
		"too much": {"X-Metadata-A", strings.Repeat("x", 4<<10)},
		"no text":  {"X-Metadata-A", "\xff"},
		"no ASCII": {"X-Metadata-A", "ü"},
		"no key":   {"X-Metadata-", "x"},
		"long key": {"X-Metadata-" + strings.Repeat("k", 250), "x"},
	} {
		if status, answer := send(headers...); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
	// What was refused has changed nothing.
	if got := metadata.Read(path); !reflect.DeepEqual(got, map[string]string{"b": "3"}) {
		t.Errorf("kept %v", got)
	}
	if status, _ := send(); status != http.StatusOK || metadata.Read(path) != nil {
		t.Errorf("kept %v", metadata.Read(path))
	}
}

func TestWhatCannotKeepMetadataKeepsItsContent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	disk := t.TempDir()
	if err := unix.Mount("none", disk, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, 0) })
	base, path := serve(t), filepath.Join(disk, "file")
	if status, answer := post(t, base, path, strings.NewReader("old")); status != http.StatusOK {
		t.Fatalf("%d %s", status, answer)
	}
	for _, name := range []string{"file", "new"} {
		status, answer := post(t, base, filepath.Join(disk, name), strings.NewReader("x"), "X-Metadata-A", "1")
		if status != http.StatusBadRequest || !strings.Contains(answer, "keeps none") {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
	holds(t, path, "old")
	if entries, _ := os.ReadDir(disk); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

func TestAnUploadThatStandsStillIsGivenUp(t *testing.T) {
	base, directory := serveIdle(t, 100*time.Millisecond), t.TempDir()
	slow, still := filepath.Join(directory, "slow"), filepath.Join(directory, "still")
	// As slow as it likes, while something comes.
	reader, writer := io.Pipe()
	go func() {
		for range 10 {
			time.Sleep(30 * time.Millisecond)
			_, _ = writer.Write([]byte("x"))
		}
		_ = writer.Close()
	}()
	if status, answer := post(t, base+"/files?path=", slow, reader); status != http.StatusOK {
		t.Errorf("%d %s", status, answer)
	}
	holds(t, slow, "xxxxxxxxxx")

	connection, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	_, _ = io.WriteString(connection, "POST /files?path="+url.QueryEscape(still)+" HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
	_ = connection.SetReadDeadline(time.Now().Add(10 * time.Second))
	if answer, err := io.ReadAll(connection); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 408 ") {
		t.Errorf("%s, %v", answer, err)
	}
	if _, err := os.Lstat(still); err == nil {
		t.Error("half of a file is left")
	}
}

func TestCompositions(t *testing.T) {
	base, directory := serveIdle(t, UploadIdle), t.TempDir()
	at := func(name string) string { return filepath.Join(directory, name) }
	compose := func(destination string, sources ...string) (int, string) {
		order, _ := json.Marshal(composition{Sources: sources, Destination: destination})
		answer, err := http.Post(base+"/files/compose", "application/json", bytes.NewReader(order))
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		content, _ := io.ReadAll(answer.Body)
		return answer.StatusCode, string(content)
	}
	large := strings.Repeat("y", 3*BlockSize+7)
	for name, content := range map[string]string{"1": "one", "2": large, "3": "", "kept": "k"} {
		if err := os.WriteFile(at(name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if status, answer := compose(at("made/whole"), at("1"), at("2"), at("3"), at("1")); status != http.StatusOK || !strings.Contains(answer, `"name":"whole"`) {
		t.Errorf("%d %s", status, answer)
	}
	holds(t, at("made/whole"), "one"+large+"one")
	// One of them may be where they go.
	if status, answer := compose(at("made/whole"), at("made/whole"), at("kept")); status != http.StatusOK {
		t.Errorf("%d %s", status, answer)
	}
	holds(t, at("made/whole"), "one"+large+"onek")
	for name, c := range map[string]struct {
		destination string
		sources     []string
		status      int
	}{
		"nothing":         {at("x"), nil, 400},
		"a missing one":   {at("x"), []string{at("made/whole"), at("none")}, 404},
		"a directory":     {at("x"), []string{at("made")}, 400},
		"a device":        {at("x"), []string{"/dev/zero"}, 400},
		"nowhere":         {"", []string{at("made/whole")}, 400},
		"over a full one": {at("made"), []string{at("made/whole")}, 400},
	} {
		if status, answer := compose(c.destination, c.sources...); status != c.status {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
	left, _ := filepath.Glob(at("*"))
	hidden, _ := filepath.Glob(at(".*"))
	if len(left) != 1 || len(hidden) != 0 {
		t.Errorf("left: %v %v", left, hidden)
	}
	holds(t, at("made/whole"), "one"+large+"onek")
}
