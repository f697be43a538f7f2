package identity

import (
	"encoding/json"
	"strings"
	"time"
)

// Rehearse takes on an identity of the usual form, to be replaced by the introduction, and leaves
// no token: files have their size then, and what is worked out on first use is known.
func (i *Identity) Rehearse() error {
	text, err := json.Marshal(&Introduction{
		Hostname:  "sb" + strings.Repeat("0", 20),
		MachineID: strings.Repeat("0", 32),
		Timestamp: time.Now().UTC().Format("2006-01-02T15:04:05.999999-07:00"),
		RootBytes: 1,
		Moved:     true,
	})
	if err != nil {
		return err
	}
	in := Introduction{received: time.Now()}
	if err := json.Unmarshal(text, &in); err != nil {
		return err
	}
	i.introducing.Lock()
	defer i.introducing.Unlock()
	if err := i.apply(&in); err != nil {
		return err
	}
	confirmed, err := i.confirm()
	if err != nil {
		return err
	}
	_, err = json.Marshal(confirmed)
	return err
}
