// Here belongs what OutcomeOf, ShouldRetry and RetryTo make of errors that no relay is needed for: those of other libraries, and
// those that a test or an adapter puts together from exported fields.
package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"slices"
	"testing"

	"github.com/emersion/go-smtp"
)

func TestErrorsOfOtherLibraries(t *testing.T) {
	for _, tt := range []struct {
		err   error
		want  Outcome
		retry bool
	}{
		{nil, Accepted, false},
		{&textproto.Error{Code: 451, Msg: "later"}, NotAccepted, true},
		{&textproto.Error{Code: 550, Msg: "never"}, NotAccepted, false},
		{&textproto.Error{Code: 250, Msg: "what?"}, Unknown, false},
		{&smtp.SMTPError{Code: 452}, NotAccepted, true},
		{&smtp.SMTPError{Code: 554}, NotAccepted, false},
		{fmt.Errorf("job 7: %w", &smtp.SMTPError{Code: 452}), NotAccepted, true},
		{textproto.ProtocolError("short response"), Unknown, false},
		{io.ErrUnexpectedEOF, Unknown, false},
		{context.DeadlineExceeded, Unknown, false},
		{&net.OpError{Op: "dial", Err: errors.New("refused")}, Unknown, false},
		{errors.New("anything"), Unknown, false},
	} {
		if got, retry := OutcomeOf(tt.err), ShouldRetry(tt.err); got != tt.want || retry != tt.retry {
			t.Errorf("%v: got %v, retry %t, want %v, %t", tt.err, got, retry, tt.want, tt.retry)
		}
		if to := RetryTo(tt.err); to != nil {
			t.Errorf("%v: RetryTo is %v", tt.err, to)
		}
	}
}

func TestErrorThatWasPutTogetherDecidesLikeOneOfTheClient(t *testing.T) {
	a := func(o Outcome, code int) RecipientResult {
		return RecipientResult{To: "a@y.example", Outcome: o, Reply: Reply{Code: code}}
	}
	b := func(o Outcome, code int) RecipientResult {
		return RecipientResult{To: "b@y.example", Outcome: o, Reply: Reply{Code: code}}
	}
	for _, tt := range []struct {
		why       string
		err       Error
		retry     bool
		to        []string
		temporary bool
	}{
		{"nothing but a code, for now", Error{Reply: Reply{Code: 451}, Outcome: NotAccepted}, true, nil, true},
		{"nothing but a code, for good", Error{Reply: Reply{Code: 550}, Outcome: NotAccepted}, false, nil, false},
		{"the zero value", Error{}, false, nil, false},
		{"a wrong key", Error{Op: OpAuth, Scope: ScopeRelay, Reply: Reply{Code: 535}, Outcome: NotAccepted,
			Recipients: []RecipientResult{a(NotAccepted, 535), b(NotAccepted, 535)}}, true, []string{"a@y.example", "b@y.example"}, false},
		{"a wrong key, after one was refused for itself", Error{Op: OpAuth, Scope: ScopeRelay, Reply: Reply{Code: 535}, Outcome: NotAccepted,
			Recipients: []RecipientResult{a(NotAccepted, 550), b(NotAccepted, 535)}}, true, []string{"b@y.example"}, false},
		{"552 to RCPT: too many recipients (RFC 5321, 4.5.3.1.10)", Error{Op: OpRcpt, Scope: ScopeRecipient, Reply: Reply{Code: 552}, Outcome: NotAccepted,
			Recipients: []RecipientResult{a(NotAccepted, 552)}}, true, []string{"a@y.example"}, true},
		{"one has it, and one was never asked about", Error{Op: OpMail, Scope: ScopeRelay, Reply: Reply{Code: 421}, Outcome: Accepted,
			Recipients: []RecipientResult{a(Accepted, 250), b(NotAccepted, 421)}}, false, []string{"b@y.example"}, false},
		{"one may have it", Error{Op: OpEnd, Scope: ScopeRelay, Outcome: Unknown,
			Recipients: []RecipientResult{a(Unknown, 250), b(NotAccepted, 450)}}, false, []string{"b@y.example"}, false},
		{"the relay has lost the connection", Error{Op: OpBody, Scope: ScopeRelay, Outcome: NotAccepted, Err: io.EOF,
			Recipients: []RecipientResult{a(NotAccepted, 250)}}, true, []string{"a@y.example"}, true},
		{"closed", Error{Op: OpWait, Scope: ScopeCaller, Outcome: NotAccepted, Err: ErrClosed, Recipients: []RecipientResult{a(NotAccepted, 0)}},
			true, []string{"a@y.example"}, false},
	} {
		err := &tt.err
		if retry, to := ShouldRetry(err), RetryTo(err); retry != tt.retry || !slices.Equal(to, tt.to) || err.Temporary() != tt.temporary {
			t.Errorf("%s: ShouldRetry %t, RetryTo %v, temporary %t; want %t, %v, %t", tt.why, retry, to, err.Temporary(), tt.retry, tt.to, tt.temporary)
		}
	}
}

func TestOpsAreShortStableWordsWithATextEach(t *testing.T) {
	words := []Op{"config", "check", "wait", "dial", "greeting", "ehlo", "starttls", "tls", "auth", "rset", "mail", "rcpt", "data", "body", "end", "quit"}
	if len(opTexts) != len(words) {
		t.Errorf("there are %d, want %d", len(opTexts), len(words))
	}
	for _, op := range words {
		if _, ok := opTexts[op]; !ok {
			t.Errorf("%q has no text", op)
		}
	}
	for line, want := range map[string]Op{
		"EHLO client.example": OpEHLO, "HELO client.example": OpEHLO, "STARTTLS": OpSTARTTLS, "AUTH PLAIN [redacted]": OpAuth, "[redacted]": OpAuth, "*": OpAuth,
		"RSET": OpRset, "MAIL FROM:<LAST@x.example>": OpMail, "RCPT TO:<. LAST>": OpRcpt, "DATA": OpData, "BDAT 5": OpData, "BDAT 0 LAST": OpEnd, ".": OpEnd, "QUIT": OpQuit,
	} {
		if got := opOfCommand(line); got != want {
			t.Errorf("%s: got %q, want %q", line, got, want)
		}
	}
}

func TestReplyTellsWhoseFaultItWas(t *testing.T) {
	for _, tt := range []struct {
		op   Op
		r    Reply
		want Scope
	}{
		{OpRcpt, Reply{Code: 550}, ScopeRecipient},
		{OpRcpt, Reply{Code: 452}, ScopeRecipient},
		{OpRcpt, Reply{Code: 421}, ScopeRelay},
		{OpMail, Reply{Code: 501}, ScopeMessage},
		{OpMail, Reply{Code: 552, EnhancedCode: EnhancedCode{5, 3, 4}}, ScopeMessage},
		{OpMail, Reply{Code: 452, EnhancedCode: EnhancedCode{4, 5, 3}, Message: "Too many messages sent"}, ScopeRelay},
		{OpMail, Reply{Code: 451, EnhancedCode: EnhancedCode{4, 4, 2}, Message: "Timeout - closing connection"}, ScopeRelay},
		{OpMail, Reply{Code: 503, Message: "need AUTH first"}, ScopeRelay},
		{OpMail, Reply{Code: 530}, ScopeRelay},
		{OpMail, Reply{Code: 250}, ScopeRelay}, // and yet it failed
		{OpData, Reply{Code: 554}, ScopeMessage},
		{OpData, Reply{Code: 432, EnhancedCode: EnhancedCode{4, 3, 2}}, ScopeRelay},
		{OpBody, Reply{Code: 552}, ScopeMessage},
		{OpEnd, Reply{Code: 550}, ScopeMessage},
		{OpEnd, Reply{Code: 354}, ScopeRelay},
		{OpRset, Reply{Code: 500}, ScopeRelay},
		{OpAuth, Reply{Code: 535}, ScopeRelay},
		{OpGreeting, Reply{Code: 554}, ScopeRelay},
	} {
		if got := scopeOfReply(tt.op, tt.r); got != tt.want {
			t.Errorf("%v to %s: got %v, want %v", tt.r, tt.op.Text(), got, tt.want)
		}
	}
}
