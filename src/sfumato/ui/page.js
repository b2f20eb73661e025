() => {
  // Ctrl-Enter (or Cmd-Enter) draws from anywhere on the page.
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      document.querySelector('#sf-generate')?.click();
    }
  });
  const spoken = document.querySelector('#sf-spoken');
  spoken?.setAttribute('aria-live', 'polite');
  // On a narrow screen the picture is below the form: bring what has changed into view.
  const calm = matchMedia('(prefers-reduced-motion: reduce)');
  const seen = (element) => {
    const box = element.getBoundingClientRect();
    return box.top >= 0 && box.top < innerHeight - 120;
  };
  const show = (element) => {
    if (!seen(element)) element.scrollIntoView({behavior: calm.matches ? 'auto' : 'smooth', block: 'start'});
  };
  let state = '';
  new MutationObserver(() => {
    const stage = document.querySelector('.sf-stage');
    if (stage && stage.dataset.state !== state) {
      if (state && stage.dataset.state !== 'idle') show(stage);
      state = stage.dataset.state;
    }
    const told = document.querySelector('.sf-error:not([data-seen])');
    if (told) {
      told.dataset.seen = 'yes';
      show(told);
    }
  }).observe(document.body, {childList: true, subtree: true});
}
