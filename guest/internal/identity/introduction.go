package identity

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"
)

// Introduction is what the host says in POST /init. Empty fields change nothing.
type Introduction struct {
	AccessToken string            `json:"accessToken"`
	EnvVars     map[string]string `json:"envVars"`
	// UnixNano is the time in nanoseconds since 1970; Timestamp is the same in RFC 3339 with
	// nanoseconds, as E2B says it, and counts where the other is not given.
	UnixNano       int64  `json:"unixNano"`
	Timestamp      string `json:"timestamp"`
	DefaultUser    string `json:"defaultUser"`
	DefaultWorkdir string `json:"defaultWorkdir"`
	Hostname       string `json:"hostname"`
	MachineID      string `json:"machineId"` // 32 hex digits
	SandboxID      string `json:"sandboxId"`
	TemplateID     string `json:"templateId"`
	Entropy        string `json:"entropy"` // base64
	// RootBytes is the size of the disk that the root file system is to fill; 0 leaves it alone.
	RootBytes int64 `json:"rootBytes"`
	// Moved tells that the VM is in another place than it believes: it was copied or set back.
	Moved bool `json:"moved"`

	received time.Time
	// By which it came; nil in a rehearsal.
	request *http.Request
}

// Confirmation is the answer: what is in force now.
type Confirmation struct {
	SandboxID   string `json:"sandboxId"`
	Hostname    string `json:"hostname"`
	MachineID   string `json:"machineId"`
	BootID      string `json:"bootId"`
	EnvdVersion string `json:"envdVersion"`
	// Its clock when it answers, in the form in which the time was told.
	UnixNano int64  `json:"unixNano,omitempty"`
	Time     string `json:"time,omitempty"`
}

// decode reads an introduction. The plain form, as our host sends it, is read by a scanner of its
// own: a restored VM runs all code for the first time, and the library's is ten times as long.
// What the scanner does not know in all its parts is the library's.
func (in *Introduction) decode(body []byte) error {
	plain := *in
	if (&scanner{rest: body}).introduction(&plain) {
		*in = plain
		return nil
	}
	return json.Unmarshal(body, in)
}

// text is the field of such a name that is a string, or nil.
func (in *Introduction) text(name string) *string {
	switch name {
	case "accessToken":
		return &in.AccessToken
	case "timestamp":
		return &in.Timestamp
	case "defaultUser":
		return &in.DefaultUser
	case "defaultWorkdir":
		return &in.DefaultWorkdir
	case "hostname":
		return &in.Hostname
	case "machineId":
		return &in.MachineID
	case "sandboxId":
		return &in.SandboxID
	case "templateId":
		return &in.TemplateID
	case "entropy":
		return &in.Entropy
	}
	return nil
}

// number is the field of such a name that is a number, or nil.
func (in *Introduction) number(name string) *int64 {
	switch name {
	case "unixNano":
		return &in.UnixNano
	case "rootBytes":
		return &in.RootBytes
	}
	return nil
}

// scanner reads JSON of few forms: objects whose names are all known, strings without escapes,
// numbers without sign, fraction or exponent, true, false and null. Its methods tell whether they
// found what they look for; if not, what was found is of no use.
type scanner struct{ rest []byte }

func (s *scanner) introduction(in *Introduction) bool {
	complete := s.object(func(name string) bool {
		if text := in.text(name); text != nil {
			return s.text(text)
		}
		if number := in.number(name); number != nil {
			return s.number(number)
		}
		switch name {
		case "moved":
			in.Moved = s.word("true")
			return in.Moved || s.word("false")
		case "envVars":
			return s.word("null") || s.texts(&in.EnvVars)
		}
		return false
	})
	s.space()
	return complete && len(s.rest) == 0
}

func (s *scanner) object(member func(name string) bool) bool {
	if !s.sign('{') {
		return false
	}
	if s.sign('}') {
		return true
	}
	for {
		var name string
		if !s.text(&name) || !s.sign(':') || !member(name) {
			return false
		}
		if s.sign('}') {
			return true
		}
		if !s.sign(',') {
			return false
		}
	}
}

func (s *scanner) texts(into *map[string]string) bool {
	if *into != nil {
		return false // named twice
	}
	read := map[string]string{}
	*into = read
	return s.object(func(name string) bool {
		var value string
		found := s.text(&value)
		read[name] = value
		return found
	})
}

func (s *scanner) text(into *string) bool {
	if !s.sign('"') {
		return false
	}
	for n, c := range s.rest {
		if c == '"' {
			*into = string(s.rest[:n])
			s.rest = s.rest[n+1:]
			return true
		}
		if c < ' ' || c == '\\' || c >= utf8.RuneSelf {
			return false
		}
	}
	return false
}

func (s *scanner) number(into *int64) bool {
	s.space()
	var value int64
	for n, c := range s.rest {
		if c < '0' || c > '9' {
			*into = value
			s.rest = s.rest[n:]
			return n > 0
		}
		if n > 0 && value == 0 || value > (math.MaxInt64-9)/10 {
			return false
		}
		value = value*10 + int64(c-'0')
	}
	return false
}

func (s *scanner) word(word string) bool {
	s.space()
	if len(s.rest) < len(word) || string(s.rest[:len(word)]) != word {
		return false
	}
	s.rest = s.rest[len(word):]
	return true
}

func (s *scanner) sign(sign byte) bool {
	s.space()
	if len(s.rest) == 0 || s.rest[0] != sign {
		return false
	}
	s.rest = s.rest[1:]
	return true
}

func (s *scanner) space() {
	for len(s.rest) > 0 && (s.rest[0] == ' ' || s.rest[0] == '\n' || s.rest[0] == '\t' || s.rest[0] == '\r') {
		s.rest = s.rest[1:]
	}
}

// encode writes a confirmation, by hand where no string needs an escape: see decode.
func (c *Confirmation) encode() ([]byte, error) {
	text := make([]byte, 0, 256)
	for _, member := range [...][2]string{
		{`{"sandboxId":"`, c.SandboxID}, {`","hostname":"`, c.Hostname}, {`","machineId":"`, c.MachineID},
		{`","bootId":"`, c.BootID}, {`","envdVersion":"`, c.EnvdVersion},
	} {
		if !plain(member[1]) {
			return json.Marshal(c)
		}
		text = append(append(text, member[0]...), member[1]...)
	}
	if c.UnixNano == 0 || c.Time != "" {
		return json.Marshal(c)
	}
	return append(strconv.AppendInt(append(text, `","unixNano":`...), c.UnixNano, 10), '}'), nil
}

func plain(text string) bool {
	for n := range len(text) {
		if c := text[n]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			return false
		}
	}
	return true
}
