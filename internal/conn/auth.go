package conn

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// maxAuthLine is the maximum length of an AUTH command, CRLF included (RFC 4954, 4). A longer initial response is sent after a 334.
const maxAuthLine = 512

// maxChallenges is how many challenges a relay may send. SCRAM uses two, GSSAPI three or four.
const maxChallenges = 10

var errChallenges = fmt.Errorf("the relay has sent more than %d challenges; authentication was given up", maxChallenges)

// saying adds the credentials and the response, which are about to be sent, to the texts that c.said removes from replies.
func (c *Conn) saying(mechanism string, response []byte) {
	username, password := c.o.Secrets()
	c.said.Name(username)
	c.said.Password(password)
	c.said.Response(mechanism, response)
}

// challengeError is a SASL mechanism's error with credentials removed: the error may quote the relay's challenge.
type challengeError struct {
	text string // scrubbed
	err  error
}

func (e *challengeError) Error() string        { return e.text }
func (e *challengeError) Is(target error) bool { return errors.Is(e.err, target) }

// authenticate authenticates the connection. Until the relay has accepted credentials, AuthTurn lets one connection authenticate
// at a time. After that, if mayLead is set, AUTH PLAIN is left to the first transaction, which pipelines its commands after
// AUTH (RFC 4954, 4) and so saves a round trip.
func (d *dialogue) authenticate(ctx context.Context, mayLead bool) *OpenError {
	c := d.c
	if d.o.Mechanism == nil {
		return nil
	}
	d.progress(StepAuth)
	began := time.Now()
	done, ok := d.o.Profile.AuthTurn(ctx)
	if !ok {
		return authFailed(&TimeoutError{Step: StepAuth, After: time.Since(began)}) // another connection's AUTH has no reply either
	}
	defer done()
	mech, err := d.o.Mechanism(ctx, &c.ext, c.tls)
	if e, ok := err.(*OpenError); ok {
		return e
	}
	if err != nil || mech == nil {
		return authFailed(err)
	}
	if c.tls == nil && !d.clearAuth { // before the mechanism produces credentials
		return &OpenError{Step: StepAuth, Permanent: true, Err: ErrClearAuth}
	}
	return d.authenticateBy(mech, mayLead)
}

// authenticateBy authenticates the connection with mech; for mayLead see authenticate.
func (d *dialogue) authenticateBy(mech sasl.Client, mayLead bool) *OpenError {
	c := d.c
	name, ir, err := mech.Start()
	if err != nil {
		return authFailed(err)
	}
	mechanism := strings.ToUpper(name)
	if !slices.Contains(c.ext.Auth, mechanism) { // do not send credentials to a relay that cannot use them
		return &OpenError{Step: StepAuth, Permanent: true, Err: &NotOfferedError{name, c.ext.Auth}}
	}
	mark := sha256.Sum256(append([]byte(name+"\x00"), ir...))
	c.authMark = mark
	if ir != nil {
		if r, refused := d.o.Profile.RefusalOf(mark); refused {
			return refusedBy(StepAuth, r)
		}
	}
	line := "AUTH " + name
	if ir != nil {
		encoded := base64.StdEncoding.EncodeToString(ir)
		if encoded == "" {
			encoded = "="
		}
		if full := line + " " + encoded + "\r\n"; len(full) <= maxAuthLine {
			c.saying(mechanism, ir)
			if mayLead && name == sasl.Plain && c.pipelining() && d.o.Profile.AuthMayBeFollowed() {
				c.pendingAuth = []byte(full)
				return nil
			}
			line, ir = line+" "+encoded, nil
		}
	}
	reply, e := d.answer(mech, mechanism, line, ir)
	if e != nil {
		return e
	}
	if (reply.Code == 502 || reply.Code == 504) && d.o.OtherMechanism != nil {
		if other := d.o.OtherMechanism(mechanism, &c.ext); other != nil {
			d.o.Profile.AuthGivenUp() // the relay refused the mechanism, not the credentials
			return d.authenticateBy(other, false)
		}
	}
	d.o.Profile.AuthAnswered(mark, reply, false)
	if reply.Class() != 2 {
		return refusedBy(StepAuth, reply)
	}
	return nil
}

// NotOfferedError is the cause if the relay does not offer the chosen mechanism.
type NotOfferedError struct {
	Mechanism string
	Offered   []string
}

func (e *NotOfferedError) Error() string {
	return fmt.Sprintf("the relay does not offer mechanism %q", e.Mechanism)
}

func authFailed(err error) *OpenError {
	if err == nil {
		return nil
	}
	return &OpenError{Step: StepAuth, Err: err}
}

// answer sends line, the AUTH command, and responds to the relay's challenges. The response to the first challenge is ir, if not
// nil. answer returns the last reply.
func (d *dialogue) answer(mech sasl.Client, mechanism, line string, ir []byte) (wire.Reply, *OpenError) {
	c := d.c
	limit := d.o.openingLimit()
	if limit > 0 {
		d.authBy = time.Now().Add(limit) // for all rounds together
	}
	reply, e := d.command(StepAuth, "AUTH "+strings.Fields(line)[1]+" "+scrub.Redacted, line, limit)
	for challenges := 1; e == nil && reply.Code == 334; challenges++ {
		var challenge []byte
		answer := ir
		if ir = nil; answer == nil {
			var err error
			if challenge, answer, err = d.next(mech, challenges); err != nil {
				return reply, d.giveUpAuth(err)
			}
		}
		if mechanism == sasl.Login && challenges == 1 && !AsksPassword(challenge) {
			c.said.Name(string(answer))
		} else {
			c.saying(mechanism, answer)
		}
		reply, e = d.command(StepAuth, scrub.Redacted, base64.StdEncoding.EncodeToString(answer), limit)
	}
	return reply, e
}

// next returns the last challenge, which is the nth, and the mechanism's response to it.
func (d *dialogue) next(mech sasl.Client, n int) (challenge, answer []byte, err error) {
	err = errChallenges
	if n <= maxChallenges {
		challenge, err = base64.StdEncoding.DecodeString(d.raw)
	}
	if err == nil {
		if answer, err = mech.Next(challenge); err != nil {
			if text := d.c.said.ScrubApart(err.Error()); text != err.Error() {
				err = &challengeError{text, err}
			}
		}
	}
	return challenge, answer, err
}

// giveUpAuth ends AUTH because of err. OAUTHBEARER reports failure in a challenge; the reply to "*" is the relay's error.
func (d *dialogue) giveUpAuth(err error) *OpenError {
	e := authFailed(err)
	r, gone := d.command(StepAuth, "*", "*", d.o.openingLimit())
	switch {
	case gone != nil || r.Class() < 4:
		return e
	case r.Code == 535: // about the credentials
		d.o.Profile.AuthAnswered(d.c.authMark, r, false)
	default:
		d.o.Profile.AuthGivenUp()
	}
	e.Reply = r
	return e
}

// AsksPassword reports whether a challenge of LOGIN clearly asks for the password.
func AsksPassword(challenge []byte) bool {
	return strings.HasPrefix(strings.ToLower(string(challenge)), "pass")
}

// Authenticate sends the pending AUTH without a transaction, if it was not sent yet. The caller holds the write side and keeps it.
func (c *Conn) Authenticate(ctx context.Context) (r Result, authenticated bool) {
	if c.pendingAuth == nil {
		return r, true
	}
	t := NewTransaction(ctx, c, Message{})
	t.guard()
	defer func() { t.unguard() }()
	authenticated = t.writeAuth() && t.sendNow() && t.awaitEnvelope()
	return t.conclude(), authenticated
}
