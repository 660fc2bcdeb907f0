package main

// TLS and AUTH.

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
)

func startTLS(b *bench) error {
	if b.brokenTLS {
		return notApplicable("its TLS is broken")
	}
	return b.burst(b.startTLS)
}

func implicitTLS(b *bench) error {
	if b.brokenTLS {
		return notApplicable("its TLS is broken")
	}
	return b.burst(b.implicitTLS)
}

// burst sends over several authenticated connections.
func (b *bench) burst(change func(*smtprelay.Config)) error {
	c, err := b.client(change)
	if err != nil {
		return err
	}
	if err := c.Ping(b.ctx); err != nil {
		return fmt.Errorf("Ping: %w", err)
	}
	if err := b.sendAll(c, 20, b.mails(100)); err != nil {
		return err
	}
	if s := c.Stats(); s.Auths == 0 || s.AuthErrors != 0 {
		return fmt.Errorf("%d AUTH commands, %d refused", s.Auths, s.AuthErrors)
	}
	return b.nothingRefused()
}

// brokenTLS is for a relay that offers TLS and fails: nothing may be sent in plaintext.
func brokenTLS(b *bench) error {
	if !b.brokenTLS {
		return notApplicable("its TLS works")
	}
	for _, change := range []func(*smtprelay.Config){b.startTLS, b.implicitTLS} {
		c, err := b.client(change, attempts(1)) // else it is retried for Timeouts.Outage
		if err != nil {
			return err
		}
		err = b.send(c, b.mail())
		if err := expect(err, smtprelay.NotAccepted, 0); err != nil {
			return err
		}
		if e := err.(*smtprelay.Error); e.Op != smtprelay.OpTLS {
			return fmt.Errorf("a failed handshake is reported as a failure of %s: %w", e.Op, err)
		}
	}
	return b.nothingInClear()
}

// nothingInClear checks that what needs TLS was not sent in plaintext.
func (b *bench) nothingInClear() error {
	for line := range strings.SplitSeq(b.dialogue.String(), "\n") {
		if strings.HasPrefix(line, "C") && !strings.HasSuffix(line, " bytes") && !strings.Contains(line, ": EHLO ") &&
			!strings.Contains(line, ": STARTTLS") && !strings.Contains(line, ": QUIT") {
			return fmt.Errorf("sent in plaintext: %s", line)
		}
	}
	return nil
}

// onceCounted calls try. A relay that counts connections late may still count one that an earlier client has closed, and refuse
// the next with 421: then onceCounted calls try again, for two seconds.
func (b *bench) onceCounted(try func() error) error {
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		err := try()
		if e, ok := errors.AsType[*smtprelay.Error](err); !ok || !b.countsLate || e.Reply.Code != 421 || time.Since(began) > 2*time.Second {
			return err
		}
	}
}

func unknownAuthority(b *bench) error {
	if b.brokenTLS {
		return notApplicable("its TLS is broken")
	}
	for _, change := range []func(*smtprelay.Config){b.startTLS, b.implicitTLS} {
		c, err := b.client(change, func(c *smtprelay.Config) { c.TLSConfig.RootCAs = x509.NewCertPool() })
		if err != nil {
			return err
		}
		err = b.onceCounted(func() error { return b.send(c, b.mail()) })
		if err := expect(err, smtprelay.NotAccepted, 0); err != nil {
			return err
		}
		// A machine in the middle may have shown the certificate, so the error may be temporary; but it must be reported as TLS.
		if e := err.(*smtprelay.Error); e.Op != smtprelay.OpTLS || !e.Temporary() {
			return fmt.Errorf("a certificate of an unknown authority is reported as a failure of %s: %w", e.Op, err)
		}
	}
	return b.nothingInClear()
}

func wrongPassword(b *bench) error {
	if b.brokenTLS {
		return notApplicable("its TLS is broken")
	}
	for _, change := range []func(*smtprelay.Config){b.startTLS, b.implicitTLS} {
		c, err := b.client(change, func(c *smtprelay.Config) { c.Password = "SG.wrong-horse" })
		if err != nil {
			return err
		}
		err = b.onceCounted(func() error { return c.Ping(b.ctx) })
		if err := expect(err, smtprelay.NotAccepted, 535); err != nil {
			return fmt.Errorf("Ping: %w", err)
		}
		err = b.send(c, b.mail())
		if err := expect(err, smtprelay.NotAccepted, 535); err != nil {
			return err
		}
		if e := err.(*smtprelay.Error); e.Op != smtprelay.OpAuth {
			return fmt.Errorf("reported as a failure of %s: %w", e.Op, err)
		}
		if strings.Contains(err.Error(), "SG.") {
			return errors.New("the password is in the error")
		}
	}
	return nil
}

// noCredentials sends without credentials where the relay requires AUTH. Relays refuse that at MAIL or at RCPT, with 530, 550 or
// 554.
func noCredentials(b *bench) error {
	if b.brokenTLS {
		return notApplicable("its TLS is broken")
	}
	c, err := b.client(b.startTLS, func(c *smtprelay.Config) { c.Username, c.Password = "", "" })
	if err != nil {
		return err
	}
	return expectPermanent(b.send(c, b.mail()))
}
