// Here belongs what a Message, a Receipt, a Result and an Error show when they are printed or logged.
package smtprelay

import (
	"bytes"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
)

const bodyNobodyPrints = "a word in confidence"

func aResult() (Message, Receipt, *Error) {
	m := Message{From: "shop@x.example", To: []string{"a@y.example", "b@y.example"}, Body: Bytes([]byte(bodyNobodyPrints)), Tag: 7}
	rcpts := []RecipientResult{
		{To: "a@y.example", Reply: Reply{Code: 250, Message: "ok"}, Outcome: Accepted, QueueID: "Q1"},
		{To: "b@y.example", Reply: Reply{Code: 550, Message: "no\none"}, Outcome: NotAccepted},
	}
	r := Receipt{Reply: Reply{Code: 250, Message: "queued as Q1"}, QueueID: "Q1", Recipients: rcpts}
	return m, r, &Error{Op: OpRcpt, subject: "<b@y.example>", Reply: rcpts[1].Reply, Outcome: Accepted, Scope: ScopeRecipient, Recipients: rcpts, Attempts: 1}
}

func TestWhatIsPrintedShowsAddressesAndOutcome(t *testing.T) {
	m, r, e := aResult()
	for _, tt := range []struct {
		got  any
		want string
	}{
		{m, `from <shop@x.example> to <a@y.example>, <b@y.example>`},
		{Message{From: NullSender, To: []string{"1@y.example", "2@y.example", "3@y.example", "4@y.example"}}, `from <> to <1@y.example>, <2@y.example>, <3@y.example>, and 1 more`},
		{r, `250 "queued as Q1"; queue ID Q1; accepted for <a@y.example>; not accepted for <b@y.example>`},
		{r.Recipients[1], `<b@y.example> not accepted: 550 "no\none"`},
		{e, `smtprelay: accepted, but not for <b@y.example>: RCPT TO <b@y.example>: 550 "no\none"`},
		{Result{Message: m, Receipt: r}, `from <shop@x.example> to <a@y.example>, <b@y.example>: 250 "queued as Q1"; queue ID Q1; accepted for <a@y.example>; not accepted for <b@y.example>`},
		{Result{Message: m, Receipt: r, Err: e}, `from <shop@x.example> to <a@y.example>, <b@y.example>: smtprelay: accepted, but not for <b@y.example>: RCPT TO <b@y.example>: 550 "no\none"`},
	} {
		for _, verb := range []string{"%v", "%+v", "%s"} {
			if got := fmt.Sprintf(verb, tt.got); got != tt.want {
				t.Errorf("%T by %s: got %s, want %s", tt.got, verb, got, tt.want)
			}
		}
	}
}

func TestBodyIsInNothingThatIsPrintedOrLogged(t *testing.T) {
	m, r, e := aResult()
	var out bytes.Buffer
	text := slog.New(slog.NewTextHandler(&out, nil))
	json := slog.New(slog.NewJSONHandler(&out, nil))
	for _, v := range []any{m, &m, Result{Message: m, Receipt: r, Err: e}, &Result{Message: m}, SendDoneInfo{Message: m}, []Message{m}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%T"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
	}
	for _, v := range []any{m, Result{Message: m, Receipt: r, Err: e}, r, e} {
		text.Info("x", "v", v)
		json.Info("x", "v", v)
	}
	for _, secret := range []string{bodyNobodyPrints, fmt.Sprintf("%x", bodyNobodyPrints), strings.Trim(fmt.Sprint([]byte(bodyNobodyPrints)), "[]")} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("the body is in %s", out.String())
		}
	}
	for _, want := range []string{"v.step=rcpt", "v.outcome=accepted", "v.scope=recipient", "v.code=550", `"not_accepted":1`, `"from":"<shop@x.example>"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is not logged", want)
		}
	}
}

// Structs of options may grow a field that cannot be compared, so that none of them can be now.
func TestOptionsCannotBeCompared(t *testing.T) {
	for _, options := range []any{Config{}, Limits{}, Retry{}, Timeouts{}, Message{}, Trace{}} {
		if reflect.TypeOf(options).Comparable() {
			t.Errorf("%T can be compared", options)
		}
	}
}
