package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
)

// newSending is a message for ann and bob; told sets what the client reports about it.
func newSending(id string) *sending {
	s := &sending{id: id, from: "shop@client.example", to: []string{"ann@relay.example", "bob@relay.example"}, done: true}
	s.setBody("one\r\ntwo")
	return s
}

func told(s *sending, overall smtprelay.Outcome, each ...smtprelay.Outcome) *sending {
	missed := false
	for i, o := range each {
		s.receipt.Recipients = append(s.receipt.Recipients, smtprelay.RecipientResult{To: s.to[i], Outcome: o})
		missed = missed || o != smtprelay.Accepted
	}
	if overall != smtprelay.Accepted || missed {
		s.err = &smtprelay.Error{Outcome: overall, Recipients: s.receipt.Recipients}
	}
	return s
}

func queued(s *sending, to ...string) entry {
	return entry{from: s.from, to: to, data: []byte("Received: by relay\n" + strings.ReplaceAll(s.header(), "\r\n", "\n") + s.want)}
}

// withField is a queue entry with an X-SMTPAPI field.
func withField(s *sending, text string, to ...string) entry {
	e := queued(s, to...)
	e.data = append([]byte("X-SMTPAPI: "+strings.TrimSuffix(text, "\n")+"\n"), e.data...)
	return e
}

func TestAuditFindsWhatTheClientReportedWrongly(t *testing.T) {
	const accepted, notAccepted, unknown = smtprelay.Accepted, smtprelay.NotAccepted, smtprelay.Unknown
	ann, bob := "ann@relay.example", "bob@relay.example"
	for _, test := range []struct {
		why    string
		sent   *sending
		ledger func(s *sending) []entry
		fault  string // a part of the error; empty means none
	}{
		{"accepted, queued once", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob)} }, ""},
		{"accepted in two transactions", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann), queued(s, bob)} }, ""},
		{"accepted, and lost", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return nil }, `reported "accepted" for <`},
		{"accepted, lost for one", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann)} }, `reported "accepted" for <bob@relay.example>, but the relay has queued it 0 times`},
		{"accepted, queued twice", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob), queued(s, ann, bob)} }, "queued it 2 times"},
		{"not accepted, not queued", told(newSending("c/1"), notAccepted),
			func(s *sending) []entry { return nil }, ""},
		{"not accepted, but queued", told(newSending("c/1"), notAccepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob)} }, `reported "not accepted"`},
		{"unknown, not queued", told(newSending("c/1"), unknown),
			func(s *sending) []entry { return nil }, ""},
		{"unknown, and there", told(newSending("c/1"), unknown),
			func(s *sending) []entry { return []entry{queued(s, ann, bob)} }, ""},
		{"unknown, sent again", told(newSending("c/1"), unknown),
			func(s *sending) []entry { return []entry{queued(s, ann, bob), queued(s, ann)} }, "queued it 2 times"},
		{"accepted in part", told(newSending("c/1"), accepted, accepted, notAccepted),
			func(s *sending) []entry { return []entry{queued(s, ann)} }, ""},
		{"accepted in part, queued for all", told(newSending("c/1"), accepted, accepted, notAccepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob)} }, `reported "not accepted" for <bob@relay.example>`},
		{"queued for a stranger", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob, "eve@relay.example")} }, "which is not a recipient"},
		{"truncated", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry {
				e := queued(s, ann, bob)
				e.data = e.data[:len(e.data)-4]
				return []entry{e}
			}, "the body arrived as"},
		{"a folded field arrives unchanged", func() *sending {
			s := told(newSending("c/1"), accepted, accepted, accepted)
			s.json = `{"to":["a","b"]}`
			return s
		}(), func(s *sending) []entry { return []entry{withField(s, "{\"to\":[\"a\",\n \t\"b\"]}", ann, bob)} }, ""},
		{"a folded field is cut", func() *sending {
			s := told(newSending("c/1"), accepted, accepted, accepted)
			s.json = `{"to":["a","b"]}`
			return s
		}(), func(s *sending) []entry { return []entry{withField(s, "{\"to\":[\"a\",\n", ann, bob)} }, "the X-SMTPAPI field arrived as"},
		{"another reverse-path", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry {
				e := queued(s, ann, bob)
				e.from = ""
				return []entry{e}
			}, "the envelope sender arrived as <>"},
		{"no error, but a recipient forgotten", told(newSending("c/1"), accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob)} }, "does not mention <bob@relay.example>"},
		{"never sent", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob), queued(newSending("c/9"), ann)} }, "c/9 is queued, but was never sent"},
		{"another check's", told(newSending("c/1"), accepted, accepted, accepted),
			func(s *sending) []entry { return []entry{queued(s, ann, bob), queued(newSending("d/9"), ann)} }, ""},
		{"an error of another type", func() *sending {
			s := newSending("c/1")
			s.err = errors.New("oh")
			return s
		}(), func(s *sending) []entry { return nil }, "not an *Error"},
		{"still sending", func() *sending {
			s := newSending("c/1")
			s.done = false
			return s
		}(), func(s *sending) []entry { return nil }, "has not returned"},
	} {
		t.Run(test.why, func(t *testing.T) {
			err := audit("c/", []*sending{test.sent}, test.ledger(test.sent))
			switch {
			case test.fault == "" && err != nil:
				t.Errorf("got %v, want no fault", err)
			case test.fault != "" && (err == nil || !strings.Contains(err.Error(), test.fault)):
				t.Errorf("got %v, want a fault with %q", err, test.fault)
			}
		})
	}
}

func TestBodyAsItMustArrive(t *testing.T) {
	for _, test := range []struct{ text, want, last string }{
		{"a\r\n.b\r\n", "a\n.b\n", ".b\r\n"},
		{"a\rb\nc\r\r\n", "a\nb\nc\n\n", "\r\n"},
		{"a\n\rb", "a\n\nb\n", "b\r\n"},
		{"", "", "\r\n"},
	} {
		var s sending
		s.setBody(test.text)
		if s.want != test.want {
			t.Errorf("%q arrives as %q, want %q", test.text, s.want, test.want)
		}
		if got := string(s.lastLine()); got != test.last {
			t.Errorf("the last line of %q is %q, want %q", test.text, got, test.last)
		}
	}
}

func TestExpectReportsWhatDiffers(t *testing.T) {
	refused := &smtprelay.Error{
		Reply:      smtprelay.Reply{Code: 550, EnhancedCode: smtprelay.EnhancedCode{5, 1, 1}},
		Outcome:    smtprelay.Accepted,
		Recipients: []smtprelay.RecipientResult{{To: "b@y.example", Outcome: smtprelay.NotAccepted, Reply: smtprelay.Reply{Code: 550}}},
	}
	for _, test := range []struct {
		why   string
		fault bool
		got   error
	}{
		{"as expected", false, expect(refused, smtprelay.Accepted, 550, "b@y.example 550")},
		{"any code", false, expect(refused, smtprelay.Accepted, 0)},
		{"another outcome", true, expect(refused, smtprelay.NotAccepted, 0)},
		{"another code", true, expect(refused, smtprelay.Accepted, 450)},
		{"another recipient", true, expect(refused, smtprelay.Accepted, 550, "a@y.example 550")},
		{"no error", true, expect(nil, smtprelay.Accepted, 0)},
	} {
		if (test.got != nil) != test.fault {
			t.Errorf("%s: got %v", test.why, test.got)
		}
	}
}
