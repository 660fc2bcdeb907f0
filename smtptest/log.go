package smtptest

import (
	"fmt"
	"strings"
)

// log writes a line of the transcript: who is "C", "S" or "--".
func (c *conn) log(who, line string) {
	if c.s.Log == nil {
		return
	}
	c.s.logMu.Lock()
	defer c.s.logMu.Unlock()
	fmt.Fprintf(c.s.Log, "%s%d: %s\n", who, c.stats.Conn, line)
}

// note writes what is neither said nor answered.
func (c *conn) note(parts ...string) {
	if c.s.Log != nil {
		c.log("--", strings.Join(parts, ""))
	}
}
