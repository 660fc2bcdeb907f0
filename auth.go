package smtprelay

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

	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// maxAuthLine is the longest AUTH command, CRLF included (RFC 4954, 4). An initial response that does not fit is sent
// after a 334.
const maxAuthLine = 512

// mechanism chooses how to authenticate; nil means not at all.
func (c *settings) mechanism(ctx context.Context, s *session) (Mechanism, *Error) {
	if c.Auth != nil {
		c.opening.Store(OpAuth)
		mech, err := c.Auth(ctx, ServerInfo{Name: c.host, Mechanisms: slices.Clone(s.ext.Auth), TLS: s.tls})
		if err != nil {
			return nil, &Error{Op: OpAuth, Outcome: NotAccepted, Err: fmt.Errorf("Config.Auth: %w", err)}
		}
		return mech, nil
	}
	if c.Username == "" && c.password.reveal() == "" {
		return nil, nil
	}
	switch {
	case slices.Contains(s.ext.Auth, sasl.Plain):
		return sasl.NewPlainClient("", c.Username, c.password.reveal()), nil
	case slices.Contains(s.ext.Auth, sasl.Login):
		return &loginClient{username: c.Username, password: c.password}, nil
	}
	err := &Error{Op: OpAuth, Outcome: NotAccepted, permanent: true}
	if len(s.ext.Auth) == 0 {
		err.Err = fmt.Errorf("the relay does not offer AUTH (it offers %s); is this the port for submission?", c.offered(s.ext.Keywords))
	} else {
		err.Err = fmt.Errorf("no mechanism in common: the relay offers %s, and a password can be given by PLAIN or LOGIN; set Config.Auth for another", c.offered(s.ext.Auth))
	}
	return nil, err
}

// offered quotes words of the relay's.
func (c *settings) offered(words []string) string {
	if len(words) == 0 {
		return "nothing"
	}
	return printable.Quote(c.said.Scrub(strings.Join(words, " ")), printable.MostWords)
}

// loginClient is the LOGIN mechanism, which has no standard: the first challenge asks for the user name and the second
// for the password, in whatever words. Only where the first one clearly asks for the password is it given at once.
type loginClient struct {
	username string
	password secret
	asked    int
}

// Start implements Mechanism.
func (l *loginClient) Start() (mech string, ir []byte, err error) { return sasl.Login, nil, nil }

// Next implements Mechanism.
func (l *loginClient) Next(challenge []byte) ([]byte, error) {
	l.asked++
	switch {
	case l.asked == 1 && !asksPassword(challenge):
		return []byte(l.username), nil
	case l.asked <= 2:
		return []byte(l.password.reveal()), nil
	}
	return nil, sasl.ErrUnexpectedServerChallenge
}

// asksPassword reports whether a challenge of LOGIN clearly asks for the password.
func asksPassword(challenge []byte) bool {
	return strings.HasPrefix(strings.ToLower(string(challenge)), "pass")
}

// maxChallenges is how many a relay may make. SCRAM has two, GSSAPI three or four.
const maxChallenges = 10

var errChallenges = fmt.Errorf("the relay has sent more than %d challenges; authentication was given up", maxChallenges)

// saying notes what is about to be said in AUTH.
func (s *session) saying(mechanism string, response []byte) {
	s.said.Name(s.cfg.Username)
	s.said.Password(s.cfg.password.reveal())
	s.said.Response(mechanism, response)
}

// challengeError is a mechanism's error that the relay had a hand in: it may quote the challenge.
type challengeError struct {
	text string // scrubbed
	err  error
}

func (e *challengeError) Error() string        { return e.text }
func (e *challengeError) Is(target error) bool { return errors.Is(e.err, target) }

// startAuth authenticates s, whose read loop does not run yet. If mayLead, PLAIN is left to lead the first transaction where
// commands may follow it in one group (RFC 4954, 4), which saves a round trip.
func (d *dialogue) startAuth(ctx context.Context, s *session, mayLead bool) *Error {
	mech, e := s.cfg.mechanism(ctx, s)
	if e != nil || mech == nil {
		return e
	}
	fail := func(err error) *Error {
		return &Error{Op: OpAuth, Outcome: NotAccepted, Err: err}
	}
	name, ir, err := mech.Start()
	if err != nil {
		return fail(err)
	}
	if !slices.Contains(s.ext.Auth, strings.ToUpper(name)) { // the token is not for a relay that cannot use it
		return &Error{Op: OpAuth, Outcome: NotAccepted, permanent: true,
			Err: fmt.Errorf("Config.Auth has chosen %q: the relay offers %s", name, s.cfg.offered(s.ext.Auth))}
	}
	mechanism := strings.ToUpper(name)
	mark := sha256.Sum256(append([]byte(name+"\x00"), ir...))
	if ir != nil {
		if e := s.cfg.profile.refusalOf(mark); e != nil {
			return e
		}
	}
	line := "AUTH " + name
	if ir != nil {
		encoded := base64.StdEncoding.EncodeToString(ir)
		if encoded == "" {
			encoded = "="
		}
		if full := line + " " + encoded + "\r\n"; len(full) <= maxAuthLine {
			if mayLead && name == sasl.Plain && s.pipelining() && s.cfg.profile.authMayBeFollowed() {
				s.saying(mechanism, ir)
				s.lead, s.leadMark = []byte(full), mark
				return nil
			}
			s.saying(mechanism, ir)
			line, ir = line+" "+encoded, nil
		}
	}
	limit := s.cfg.Timeouts.Command
	if limit > 0 {
		d.authBy = time.Now().Add(limit) // of all rounds together
	}
	reply, e := d.command(OpAuth, "AUTH "+name+" "+redacted, line, limit)
	for challenges := 1; e == nil && reply.Code == 334; challenges++ {
		var challenge []byte
		answer := ir
		if ir = nil; answer == nil {
			err := errChallenges
			if challenges <= maxChallenges {
				challenge, err = base64.StdEncoding.DecodeString(d.raw)
			}
			if err == nil {
				if answer, err = mech.Next(challenge); err != nil {
					if text := s.said.ScrubApart(err.Error()); text != err.Error() {
						err = &challengeError{text, err}
					}
				}
			}
			if err != nil {
				e := fail(err)
				// Given up, as for OAUTHBEARER whose challenge was the bad news. The refusal is the reply to that.
				if r, gone := d.command(OpAuth, "*", "*", limit); gone == nil && r.Class() >= 4 {
					s.cfg.countAuth(false)
					e.Reply = publicReply(r)
				}
				return e
			}
		}
		if mechanism == sasl.Login && challenges == 1 && !asksPassword(challenge) {
			s.said.Name(string(answer))
		} else {
			s.saying(mechanism, answer)
		}
		reply, e = d.command(OpAuth, redacted, base64.StdEncoding.EncodeToString(answer), limit)
	}
	if e != nil {
		return e
	}
	s.cfg.countAuth(reply.Class() == 2)
	if reply.Class() != 2 {
		return s.cfg.authRefused(reply, mark)
	}
	return nil
}

// authRefused takes in the relay's refusal of credentials, of which mark is the mark.
func (c *settings) authRefused(r wire.Reply, mark [sha256.Size]byte) *Error {
	e := refusedBy(OpAuth, r)
	if c.explainAuth(e) {
		c.profile.credentialsRefused(mark, e)
	}
	return e
}

// explainAuth says what to do where e is the relay's refusal of credentials for good, and reports whether it is.
func (c *settings) explainAuth(e *Error) bool {
	if e.Op != OpAuth || e.Code/100 != 5 || e.says(tooManyConns, OpAuth) {
		return false
	}
	e.Err = errors.New("check Username and Password (SendGrid's are the word apikey and an API key that may send mail)")
	if c.Auth != nil {
		e.Err = errors.New("check what Config.Auth returns")
	}
	return true
}

// authenticate sends the AUTH that was to lead the first transaction alone.
func (s *session) authenticate(ctx context.Context) *Error {
	if s.lead == nil {
		return nil
	}
	t := newTransaction(ctx, s, &Message{}, 0, MailOptions{}, nil)
	t.guard()
	defer func() { t.unguard() }()
	if t.lead() && t.sendNow() && t.awaitEnvelope() {
		return nil
	}
	r := t.result()
	e := verdict(t.m, nil, &r)
	if e != nil {
		s.cfg.explainAuth(e)
	}
	return e
}

// refused credentials are not tried again for a while.
