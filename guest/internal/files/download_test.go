package files

import (
	"bytes"
	"compress/gzip"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// fetch asks for a file with headers, names and values in turn, and leaves the content as it came.
func fetch(t *testing.T, method, base, path string, headers ...string) (*http.Response, []byte) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, base+url.QueryEscape(path), nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Accept-Encoding", "identity")
	for n := 0; n < len(headers); n += 2 {
		request.Header.Set(headers[n], headers[n+1])
	}
	answer, err := http.DefaultTransport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer, content
}

// settledFile is long unchanged; its sizes are around what is looked at first.
func settledFile(t *testing.T, size int) (string, []byte) {
	t.Helper()
	path, content := filepath.Join(t.TempDir(), "file"), bytes.Repeat([]byte("0123456789"), size/10+1)[:size]
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, past, past); err != nil {
		t.Fatal(err)
	}
	return path, content
}

func TestRanges(t *testing.T) {
	base := serve(t)
	for _, size := range []int{26, chunkSize, chunkSize + 1, 3 * BlockSize} {
		path, content := settledFile(t, size)
		last := strconv.Itoa(size - 1)
		for given, expected := range map[string][]byte{
			"bytes=0-0":             content[:1],
			"bytes=5-9":             content[5:10],
			"bytes=-3":              content[size-3:],
			"bytes=" + last + "-":   content[size-1:],
			"bytes=10-99999999":     content[10:],
			"bytes=0-" + last:       content,
			"bytes=-9999999":        content,
			"bytes=20-":             content[20:],
			"bytes=-" + last + "  ": content[1:],
		} {
			answer, got := fetch(t, http.MethodGet, base, path, "Range", given)
			if answer.StatusCode != http.StatusPartialContent || !bytes.Equal(got, expected) {
				t.Errorf("%s of %d: %d, %d bytes", given, size, answer.StatusCode, len(got))
			}
		}
		for _, given := range []string{"bytes=" + strconv.Itoa(size) + "-", "bytes=9-8", "lines=1-2"} {
			answer, _ := fetch(t, http.MethodGet, base, path, "Range", given)
			if answer.StatusCode != http.StatusRequestedRangeNotSatisfiable {
				t.Errorf("%s of %d: %d", given, size, answer.StatusCode)
			}
		}
	}
}

func TestSeveralRanges(t *testing.T) {
	path, content := settledFile(t, chunkSize+100)
	answer, body := fetch(t, http.MethodGet, serve(t), path, "Range", "bytes=0-1,100-102,-2")
	_, parameters, err := mime.ParseMediaType(answer.Header.Get("Content-Type"))
	if err != nil || answer.StatusCode != http.StatusPartialContent {
		t.Fatalf("%d, %v", answer.StatusCode, err)
	}
	parts := multipart.NewReader(bytes.NewReader(body), parameters["boundary"])
	for _, expected := range [][]byte{content[:2], content[100:103], content[len(content)-2:]} {
		part, err := parts.NextPart()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(part); err != nil || !bytes.Equal(got, expected) {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestConditions(t *testing.T) {
	base := serve(t)
	path, content := settledFile(t, 100)
	first, _ := fetch(t, http.MethodGet, base, path)
	etag, modified := first.Header.Get("ETag"), first.Header.Get("Last-Modified")
	if etag[:2] != "W/" {
		t.Errorf("%s is strong, of a file that has just been changed", etag)
	}
	for _, c := range []struct {
		name, value string
		status      int
	}{
		{"If-None-Match", etag, 304}, {"If-None-Match", `"x", ` + etag, 304}, {"If-None-Match", "*", 304}, {"If-None-Match", `"x"`, 200},
		{"If-Modified-Since", modified, 304}, {"If-Modified-Since", time.Now().Add(-2 * time.Hour).UTC().Format(http.TimeFormat), 200},
		{"If-Unmodified-Since", modified, 200}, {"If-Unmodified-Since", time.Now().Add(-2 * time.Hour).UTC().Format(http.TimeFormat), 412},
		{"If-Match", `"x"`, 412}, {"If-Match", "*", 200},
	} {
		answer, got := fetch(t, http.MethodGet, base, path, c.name, c.value)
		if answer.StatusCode != c.status || c.status == 200 && !bytes.Equal(got, content) {
			t.Errorf("%s: %s: %d, %d bytes", c.name, c.value, answer.StatusCode, len(got))
		}
	}
	if err := os.WriteFile(path, content[:99], 0o644); err != nil {
		t.Fatal(err)
	}
	if answer, _ := fetch(t, http.MethodGet, base, path, "If-None-Match", etag); answer.StatusCode != http.StatusOK {
		t.Errorf("of a file that was changed: %d", answer.StatusCode)
	}
}

func TestHead(t *testing.T) {
	base := serve(t)
	for _, size := range []int{0, 100, 3 * BlockSize} {
		path, _ := settledFile(t, size)
		answer, body := fetch(t, http.MethodHead, base, path)
		if answer.StatusCode != http.StatusOK || answer.ContentLength != int64(size) || len(body) != 0 || answer.Header.Get("Accept-Ranges") != "bytes" {
			t.Errorf("%d bytes: %d, %v", size, answer.StatusCode, answer.Header)
		}
	}
	if answer, _ := fetch(t, http.MethodHead, base, "/no/such/file"); answer.StatusCode != http.StatusNotFound {
		t.Errorf("missing: %d", answer.StatusCode)
	}
}

func TestPackedDownloads(t *testing.T) {
	base := serve(t)
	for _, size := range []int{0, 100, 3 * BlockSize} {
		path, content := settledFile(t, size)
		answer, body := fetch(t, http.MethodGet, base, path, "Accept-Encoding", "gzip")
		unpacked, err := gzip.NewReader(bytes.NewReader(body))
		if err != nil || answer.Header.Get("Content-Encoding") != "gzip" {
			t.Fatalf("%v, %v", answer.Header, err)
		}
		if got, err := io.ReadAll(unpacked); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes: %d, %v", size, len(got), err)
		}
	}
	path, content := settledFile(t, 100)
	for given, packed := range map[string]bool{
		"": false, "identity": false, "gzip;q=0": false, "br, zstd": false, "*;q=0": false, "gzip;q=0.5, identity": false,
		"br, gzip;q=0.5": true, "GZIP": true, "*": true, "deflate, *;q=0.1": true, "gzip;q=oops": true,
	} {
		answer, body := fetch(t, http.MethodGet, base, path, "Accept-Encoding", given)
		if got := answer.Header.Get("Content-Encoding") == "gzip"; got != packed || !packed && !bytes.Equal(body, content) {
			t.Errorf("%q: packed is %v", given, got)
		}
	}
	// A part is a part of the file, not of what it is packed into.
	answer, body := fetch(t, http.MethodGet, base, path, "Accept-Encoding", "gzip", "Range", "bytes=1-2")
	if answer.StatusCode != http.StatusPartialContent || string(body) != "12" {
		t.Errorf("%d %q", answer.StatusCode, body)
	}
}

func TestAPartOfAKernelFile(t *testing.T) {
	answer, body := fetch(t, http.MethodGet, serve(t), "/proc/self/status", "Range", "bytes=0-4")
	if answer.StatusCode != http.StatusPartialContent || string(body) != "Name:" {
		t.Errorf("%d %q", answer.StatusCode, body)
	}
}
