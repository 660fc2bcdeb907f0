package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/smtprelay/smtprelay"
)

// A check sends through one relay. Besides what it checks itself, at its end what the client reported is compared with what the
// relay has queued.
type check struct {
	name string
	run  func(b *bench) error
}

// notApplicable is the error of a check that makes no sense for a relay; its text is the reason.
type notApplicable string

func (n notApplicable) Error() string { return string(n) }

var checks = []check{
	{"one message", oneMessage},
	{"queue ID", queueID},
	{"200 messages at once", manyMessages},
	{"200 through SendAll", sendAll},
	{"overlap", overlap},
	{"QUIT right after the dot", quitBehindDot},
	{"our own limits", ownLimits},
	{"messages per connection", messagesPerConnection},
	{"connections", connections},
	{"too many recipients", tooManyRecipients},
	{"one of three refused", oneRefused},
	{"one of three busy", oneBusy},
	{"all refused", allRefused},
	{"all or nothing", allOrNothing},
	{"MAIL refused", mailRefused},
	{"25 refused in a row", refusedInARow},
	{"too big", tooBig},
	{"too big, size unknown", tooBigUnknown},
	{"nearly too big", nearlyTooBig},
	{"idle", idle},
	{"idle over TLS", idleTLS},
	{"line ends and dots", lineEnds},
	{"8-bit body", eightBit},
	{"null reverse-path", nullReversePath},
	{"SMTPUTF8", utf8Address},
	{"X-SMTPAPI with 1,000 substitutions", substitutions},
	{"STARTTLS, AUTH PLAIN", startTLS},
	{"TLS, AUTH LOGIN", implicitTLS},
	{"TLS offered but broken", brokenTLS},
	{"unknown authority", unknownAuthority},
	{"wrong password", wrongPassword},
	{"no credentials", noCredentials},
	{"cut after the dot", cutBehindDot},
	{"cut before the dot", cutBeforeDot},
	{"session killed in a body", killedInBody},
	{"body fails half-way", bodyFails},
	{"cancelled in a body", cancelledInBody},
	{"Shutdown under load", shutdown},
	{"relay restarted", restarted},
	{"a body of commands", bodyOfCommands},
}

// chunkChecks are for CHUNKING only.
var chunkChecks = []check{
	{"how bodies go", goInChunks},
}

// expect reports an error that is not an *Error with this outcome, this code (0: any) and, if any are given, these refused
// recipients, each "address code".
func expect(err error, outcome smtprelay.Outcome, code int, refused ...string) error {
	if err == nil {
		return fmt.Errorf("accepted without an error; expected %q", outcome)
	}
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok {
		return fmt.Errorf("not an *Error but a %T: %w", err, err)
	}
	if e.Outcome != outcome {
		return fmt.Errorf("the outcome is %q, not %q: %w", e.Outcome, outcome, err)
	}
	if code != 0 && e.Reply.Code != code {
		return fmt.Errorf("the code is %d, not %d: %w", e.Reply.Code, code, err)
	}
	if len(refused) == 0 {
		return nil
	}
	var got []string
	for _, r := range e.Recipients {
		if r.Outcome != smtprelay.Accepted {
			got = append(got, fmt.Sprintf("%s %d", r.To, r.Reply.Code))
		}
	}
	if !slices.Equal(got, refused) {
		return fmt.Errorf("reported as refused: %q, not %q: %w", got, refused, err)
	}
	return nil
}

// expectPermanent reports an error that is not a permanent refusal.
func expectPermanent(err error) error {
	if err := expect(err, smtprelay.NotAccepted, 0); err != nil {
		return err
	}
	if e := err.(*smtprelay.Error); e.Temporary() {
		return fmt.Errorf("reported as temporary: %w", err)
	}
	return nil
}
