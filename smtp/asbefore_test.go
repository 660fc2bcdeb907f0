// Here belongs which errors of a Client are refusals to the callers of net/smtp.
package smtp

import (
	"errors"
	"io"
	"net/textproto"
	"testing"

	"github.com/smtprelay/smtprelay"
)

func TestOnlyWhatWasAcceptedForNobodyIsARefusal(t *testing.T) {
	for _, outcome := range []smtprelay.Outcome{smtprelay.NotAccepted, smtprelay.Unknown} {
		for _, code := range []int{0, 250, 354, 421, 451, 550} {
			e := &smtprelay.Error{Op: smtprelay.OpEnd, Outcome: outcome}
			if e.Reply.Code = code; code == 0 {
				e.Err = io.EOF
			}
			err := asBefore(e)
			_, bare := err.(*textproto.Error)
			_, found := errors.AsType[*textproto.Error](err)
			if want := outcome == smtprelay.NotAccepted && code >= 400; bare != want || found != want {
				t.Errorf("%v, code %d: a refusal by assertion %v, by errors.As %v", outcome, code, bare, found)
			}
			if e, ok := errors.AsType[*smtprelay.Error](err); !bare && (!ok || e.Outcome != outcome) {
				t.Errorf("%v, code %d: got %v, which has lost its outcome", outcome, code, err)
			}
		}
	}
	if asBefore(nil) != nil {
		t.Error("no error has become one")
	}
}
