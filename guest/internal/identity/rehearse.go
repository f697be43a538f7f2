package identity

import (
	"strconv"
	"strings"
	"time"
)

// Rehearse takes on an identity of the usual form, to be replaced by the introduction, and leaves
// no token: files have their size then, and what is worked out on first use is known.
func (i *Identity) Rehearse() error {
	if _, err := urandom(); err != nil {
		return err
	}
	in := Introduction{received: time.Now()}
	body := `{"hostname":"sb` + strings.Repeat("0", 20) + `","machineId":"` + strings.Repeat("0", 32) +
		`","unixNano":` + strconv.FormatInt(time.Now().UnixNano(), 10) + `,"rootBytes":1,"moved":true}`
	if err := in.decode([]byte(body)); err != nil {
		return err
	}
	i.introducing.Lock()
	defer i.introducing.Unlock()
	if err := i.apply(&in); err != nil {
		return err
	}
	_, err := i.answer(&in)
	return err
}
