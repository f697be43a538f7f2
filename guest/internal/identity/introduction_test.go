package identity

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

// What the host sends, as it sends it.
const usual = `{"accessToken": "0123abcd", "sandboxId": "sbone", "templateId": "base", "hostname": "sbone", ` +
	`"machineId": "00112233445566778899aabbccddeeff", "envVars": {"A": "1", "B": ""}, ` +
	`"timestamp": "2026-01-02T03:04:05.678901+00:00", "unixNano": 1767323045678901234, ` +
	`"entropy": "AAECAwQF+/8=", "rootBytes": 5368709120, "moved": true}`

func TestTheUsualIntroductionNeedsNoLibrary(t *testing.T) {
	for _, body := range []string{usual, strings.ReplaceAll(usual, " ", ""), " {\n\t} ", `{"moved":false,"envVars":{}}`} {
		var in Introduction
		if !(&scanner{rest: []byte(body)}).introduction(&in) {
			t.Errorf("%s is not understood", body)
		}
	}
}

func FuzzAnIntroductionIsWhatTheLibraryReads(f *testing.F) {
	for _, body := range []string{
		usual, `{}`, ``, `null`, `[]`, `{`, `{"a":1}`, `{"hostname":"\u00e4"}`, `{"hostname":"ä"}`, `{"hostname":null}`,
		`{"hostname":7}`, `{"rootBytes":-1}`, `{"rootBytes":01}`, `{"rootBytes":1.5}`, `{"rootBytes":1e3}`, `{"rootBytes":0}`,
		`{"rootBytes":9223372036854775807}`, `{"rootBytes":9223372036854775808}`, `{"rootBytes":"1"}`, `{"rootBytes":}`,
		`{"moved":tru}`, `{"moved":truefalse}`, `{"hostname":"a","hostname":"b"}`, `{"hostname":"a",}`, `{,}`, `{} {}`,
		`{"envVars":null}`, `{"envVars":{"A":null}}`, `{"envVars":{"A":{}}}`, `{"envVars":{"A":"1"},"envVars":{"B":"2"}}`,
		`{"HOSTNAME":"h"}`, `{"hostname":"a` + "\x00" + `"}`, `{"hostname":"a` + "\xff" + `"}`, `{"hostname" : "a" , "moved" : true }`,
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		var ours, theirs Introduction
		err, expected := ours.decode([]byte(body)), json.Unmarshal([]byte(body), &theirs)
		if (err == nil) != (expected == nil) || expected == nil && !reflect.DeepEqual(ours, theirs) {
			t.Errorf("%q is %+v %v, not %+v %v", body, ours, err, theirs, expected)
		}
	})
}

func FuzzAConfirmationIsWhatTheLibraryWrites(f *testing.F) {
	f.Add("sbone", "1.0", int64(1), "")
	f.Add("sb\"one", "", int64(7), "")
	f.Add("ä\\", "\x00\xff", int64(-1), "now")
	f.Add("", "", int64(0), "")
	f.Fuzz(func(t *testing.T, id, version string, nano int64, now string) {
		c := Confirmation{SandboxID: id, Hostname: id, MachineID: version, BootID: "", EnvdVersion: version, UnixNano: nano, Time: now}
		text, err := c.encode()
		expected, _ := json.Marshal(&c)
		var ours, theirs map[string]any
		if err != nil || json.Unmarshal(text, &ours) != nil || json.Unmarshal(expected, &theirs) != nil || !reflect.DeepEqual(ours, theirs) {
			t.Errorf("%s %v, not %s", text, err, expected)
		}
	})
}
