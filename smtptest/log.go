package smtptest

import (
	"fmt"
	"strings"
	"time"
)

// Line is a line of a connection's transcript: see [Server].OnLine. Messages and secrets are not in it.
type Line struct {
	Conn int       // the connection, counted from 1
	Who  string    // "C": the client has said Text; "S": the relay has answered; "--": something else has happened
	Text string    // without its line end; what a client has sent may have any octets
	Turn int       // how many turns the connection has had so far: see Stats.Turns
	TLS  bool      // the connection is encrypted
	Time time.Time // when the relay wrote or carried out the line
}

// log writes a line of the transcript: who is "C", "S" or "--".
func (c *conn) log(who, text string) {
	s := c.s
	if s.Log == nil && s.OnLine == nil {
		return
	}
	s.logMu.Lock()
	defer s.logMu.Unlock()
	if s.Log != nil {
		fmt.Fprintf(s.Log, "%s%d: %s\n", who, c.stats.Conn, text)
	}
	if s.OnLine != nil {
		s.OnLine(Line{Conn: c.stats.Conn, Who: who, Text: text, Turn: int(c.wire.turns.Load()), TLS: c.tls != nil, Time: time.Now()})
	}
}

// note writes what is neither said nor answered.
func (c *conn) note(parts ...string) {
	if c.s.Log != nil || c.s.OnLine != nil {
		c.log("--", strings.Join(parts, ""))
	}
}
