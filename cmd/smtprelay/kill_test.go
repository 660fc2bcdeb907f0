//go:build unix

// Runs of send that are killed or interrupted, as processes of their own. A signal is sent when the relay has seen so many events.
// "-kill.messages=10000 -kill.times=50" is the long form.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

var (
	killMessages = flag.Int("kill.messages", 300, "messages that are sent by runs which are killed")
	killTimes    = flag.Int("kill.times", 12, "how often")
	killSeed     = flag.Uint64("kill.seed", 1, "of the moments")
)

// process starts the program; signal gets its process id as soon as there is one.
func process(t *testing.T, started func(*os.Process), args ...string) (code int, out string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "SMTPRELAY_TEST_MAIN=1")
	var buf bytes.Buffer
	cmd.Stdout, cmd.Stderr = &buf, &buf
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	started(cmd.Process)
	err = cmd.Wait()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), buf.String()
}

// after calls do once, when the relay has seen n events from the step on.
type after struct {
	left atomic.Int64
	do   atomic.Pointer[func()]
}

func (a *after) set(n int64, do func()) {
	a.do.Store(&do)
	a.left.Store(n)
}

func (a *after) count(smtptest.Event) bool {
	if a.left.Add(-1) == 0 {
		(*a.do.Load())()
	}
	return false
}

// arrived is how often the relay has what was sent to each.
func arrived(relay *smtptest.Server) map[string]int {
	n := map[string]int{}
	for _, m := range relay.Messages() {
		n[m.To[0]]++
	}
	return n
}

func TestRunsThatAreKilledSendNothingTwiceAndLoseNothing(t *testing.T) {
	dir := t.TempDir()
	mails := filepath.Join(dir, "mails")
	for i := range *killMessages {
		write(t, filepath.Join(mails, fmt.Sprintf("%06d.eml", i)), eml(fmt.Sprintf("user%d@example.org", i), fmt.Sprint("message ", i)))
	}
	relay := relayFor(t, func(s *smtptest.Server) { s.DropBodies = true })
	moment := new(after)
	relay.Fault(smtptest.Fault{Count: -1, When: moment.count})
	random := rand.New(rand.NewPCG(*killSeed, 0))
	most := int64(*killMessages * 6 * 2 / *killTimes) // some six events for each message
	var kills, runs int
	var out string
	for code := -1; code == -1 || kills < *killTimes && code == exitSomeLeft; runs++ {
		if runs > 10**killTimes {
			t.Fatalf("after %d runs there is no end: %s", runs, out)
		}
		code, out = process(t, func(p *os.Process) {
			if kills < *killTimes {
				moment.set(1+random.Int64N(most), func() { _ = p.Kill() })
			} else {
				moment.set(-1, nil)
			}
		}, "send", "-q", "--journal", filepath.Join(dir, "journal"), mails)
		if code == -1 {
			kills++
		}
	}
	unknown := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^  .*: to (\S+)$`).FindAllStringSubmatch(out, -1) {
		unknown[m[1]] = true
	}
	got := arrived(relay)
	both := 0
	for i := range *killMessages {
		to := fmt.Sprintf("user%d@example.org", i)
		switch n := got[to]; {
		case n > 1:
			t.Errorf("%s has it %d times", to, n)
		case n == 0 && !unknown[to]:
			t.Errorf("%s does not have it, and is not listed as unknown", to)
		case n == 1 && unknown[to]:
			both++
		}
	}
	if kills == 0 {
		t.Error("no run was killed")
	}
	t.Logf("seed %d: %d runs, %d of them killed; of %d messages %d arrived once, %d are listed as unknown, of which %d have arrived", *killSeed, runs, kills, *killMessages, len(got), len(unknown), both)
	if t.Failed() {
		t.Log(out)
	}
}

func TestInterruptFinishesWhatIsUnderWayAndTheNextRunDoesTheRest(t *testing.T) {
	dir := t.TempDir()
	mails := filepath.Join(dir, "mails")
	const n = 400
	for i := range n {
		write(t, filepath.Join(mails, fmt.Sprintf("%06d.eml", i)), eml(fmt.Sprintf("user%d@example.org", i), fmt.Sprint("message ", i)))
	}
	relay := relayFor(t)
	moment := new(after)
	relay.Fault(smtptest.Fault{At: smtptest.Accepted, Count: -1, When: moment.count})
	args := []string{"send", "-q", "--journal", filepath.Join(dir, "journal"), mails}
	code, out := process(t, func(p *os.Process) { moment.set(30, func() { _ = p.Signal(syscall.SIGINT) }) }, args...)
	first := len(arrived(relay))
	if code != exitSomeLeft || first < 30 || first == n || !regexp.MustCompile(fmt.Sprintf(`Messages: %d accepted\.`, first)).MatchString(out) {
		t.Errorf("exit status %d, %d arrived: %s", code, first, out)
	}
	code, out = process(t, func(*os.Process) {}, args...)
	if code != 0 || len(relay.Messages()) != n || len(arrived(relay)) != n {
		t.Errorf("exit status %d, %d messages to %d: %s", code, len(relay.Messages()), len(arrived(relay)), out)
	}
}
