package callsites

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/smtprelay/smtprelay"
)

// reset mails a link to a user who has forgotten a password, and reports the outcome to the browser.
type reset struct{ mail *smtprelay.Client }

func (h *reset) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to := r.FormValue("email")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 20*time.Second) // closing the tab does not cancel the mail
	defer cancel()
	_, err := h.mail.Send(ctx, smtprelay.Message{
		From: "shop@example.com", To: []string{to}, Body: smtprelay.Bytes(message(to)),
	})
	switch e, _ := errors.AsType[*smtprelay.Error](err); {
	case err == nil:
		w.WriteHeader(http.StatusOK)
	case e.Outcome == smtprelay.Unknown:
		w.WriteHeader(http.StatusAccepted) // the mail may arrive
	case smtprelay.ShouldRetry(err):
		w.WriteHeader(http.StatusServiceUnavailable)
	case e.Scope == smtprelay.ScopeRecipient, e.Op == smtprelay.OpCheck:
		w.WriteHeader(http.StatusUnprocessableEntity) // no such mailbox, or not an address
	default:
		w.WriteHeader(http.StatusInternalServerError)
	}
}
