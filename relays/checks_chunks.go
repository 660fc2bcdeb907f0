package main

// Bodies in chunks, and what a relay does with a body whose recipients it has refused.

import (
	"fmt"
	"slices"

	"github.com/smtprelay/smtprelay"
)

// goInChunks checks the client's choice against the relay's answer to the suite: the client sends bodies in chunks only to a
// relay that discards the octets of a refused chunk.
func goInChunks(b *bench) error {
	if err := b.throughProxy(0); err != nil {
		return err
	}
	c, err := b.client()
	if err != nil {
		return err
	}
	for range 3 {
		if err := b.send(c, b.mail()); err != nil {
			return err
		}
	}
	if err := c.Close(); err != nil {
		return err
	}
	chunks, data := b.proxy.said("BDAT 0 LAST"), b.proxy.said("DATA")
	if b.habit.discards() && (chunks != 3 || data != 0) {
		return fmt.Errorf("%d of 3 bodies went in chunks, %d by DATA, to a relay that discards refused chunks: %s", chunks, data, b.habit)
	}
	if !b.habit.discards() && (chunks != 0 || data != 3) {
		return fmt.Errorf("%d of 3 bodies went in chunks, %d by DATA, to a relay that does not discard refused chunks: %s", chunks, data, b.habit)
	}
	return nil
}

// bodyOfCommands sends bodies that consist of commands to a relay which refuses the recipient, the sender, or both: none may
// become a mail. The second body needs no MAIL, since a transaction with the real sender may be open.
func bodyOfCommands(b *bench) error {
	victim := "victim-of-" + b.mode + "@relay.example"
	mail := "MAIL FROM:<ceo@client.example>\r\n"
	rest := "RCPT TO:<" + victim + ">\r\nDATA\r\nSubject: smuggled\r\n\r\nSend money.\r\n.\r\n"
	for _, warm := range []bool{false, true} {
		for _, from := range []string{"shop@client.example", "refused@client.example"} {
			for _, to := range []string{"refused", "busy"} {
				for _, commands := range []string{mail + rest, rest, "RSET\r\n" + mail + rest, ".\r\nRSET\r\n" + mail + rest} {
					c, err := b.client(attempts(1))
					if err != nil {
						return err
					}
					if warm {
						if err := b.send(c, b.mail()); err != nil {
							return err
						}
					}
					s := b.mail(to)
					s.from = from
					// Few lines before the commands: go-smtp hangs up after 4 unknown ones.
					s.body = smtprelay.Bytes([]byte("Subject: a question\r\n\r\nhello\r\n" + commands))
					if err := expect(b.send(c, s), smtprelay.NotAccepted, 0); err != nil {
						return err
					}
					if err := c.Close(); err != nil {
						return err
					}
				}
			}
		}
	}
	entries, err := b.queued(b.root)
	if err != nil {
		return err
	}
	smuggled := 0
	for _, e := range entries {
		if slices.Contains(e.to, victim) {
			smuggled++
		}
	}
	if smuggled > 0 {
		return fmt.Errorf("%d of %d bodies became mail to the victim", smuggled, len(b.sent))
	}
	return nil
}
