package smtptest

import (
	"fmt"
	"strings"
	"time"
)

// Line is a line of a connection's transcript: see [Server].OnLine. Messages and secrets are not in it.
type Line struct {
	Conn int       // the connection, 1-based
	Who  string    // "C": the client sent Text; "S": the relay replied; "--": any other event
	Text string    // without its line end; a client's line may contain any octets
	Turn int       // turns of the connection so far: see Stats.Turns
	TLS  bool      // the connection is encrypted
	Time time.Time // when the relay wrote or processed the line
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

// note logs an event that is neither a command nor a reply.
func (c *conn) note(parts ...string) {
	if c.s.Log != nil || c.s.OnLine != nil {
		c.log("--", strings.Join(parts, ""))
	}
}
